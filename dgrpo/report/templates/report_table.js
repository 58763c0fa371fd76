// The table of completions: views, filter, sorting, rows that open.
const PAGE = 40;
const table = data.completions, texts = table.texts;
const state = { view: 0, filter: "", sort: null, descending: true, shown: PAGE };
const shortName = (name) => name.replace(/_reward$/, "").replaceAll("_", " ");

function columnsOf(view) {
  const number = (name, value) => ({ name, value, className: "number" });
  const columns = [
    { name: "step", value: (row) => row.step, className: "number step" },
    { name: "prompt", value: (row) => texts[row.prompt], className: "prompt" },
    { name: "completion", value: (row) => texts[row.text], className: "" },
    ...table.rewards.map((name, k) => number(shortName(name), (row) => row.rewards[k])),
  ];
  if (table.rewards.length > 1) columns.push(number("total", (row) => row.total));
  if (view.rows.some((row) => row.advantage !== null)) columns.push(number("advantage", (row) => row.advantage));
  if (view.rows.some((row) => row.earlier)) columns.push(number("change", (row) => row.change));
  return columns;
}

function order(a, b) {
  if (a === b) return 0;
  if (a === null || a === undefined) return -1;
  if (b === null || b === undefined) return 1;
  return typeof a === "string" ? a.localeCompare(b) : a - b;
}

function chosenRows() {
  const view = table.views[state.view], wanted = state.filter.toLowerCase();
  const holds = (text) => text.toLowerCase().includes(wanted);
  const rows = view.rows.filter((row) => !wanted || holds(texts[row.prompt]) || holds(texts[row.text]) || (row.earlier && holds(texts[row.earlier.text])));
  if (state.sort === null) return rows;
  const value = columnsOf(view)[state.sort].value;
  return [...rows].sort((a, b) => order(value(a), value(b)) * (state.descending ? -1 : 1));
}

function marked(parent, text) {
  const wanted = state.filter.toLowerCase(), lower = text.toLowerCase();
  let at = 0;
  // Lower case may be longer than the text in a few scripts; the places would then be wrong.
  for (let hit; wanted && lower.length === text.length && (hit = lower.indexOf(wanted, at)) >= 0; at = hit + wanted.length) {
    parent.append(text.slice(at, hit));
    make("mark", parent, "", text.slice(hit, hit + wanted.length));
  }
  parent.append(text.slice(at));
}

function fillText(cell, text, when) {
  if (when) make("div", cell, "when", when);
  marked(make("div", cell, "text mono"), text || "(nothing)");
}

function showRows() {
  const view = table.views[state.view], columns = columnsOf(view), rows = chosenRows();
  find("about").textContent = `${view.help[0].toUpperCase()}${view.help.slice(1)}. ${rows.length} of ${table.logged.toLocaleString("en")} logged.` +
    (table.prefix ? " Instructions that all prompts begin with are left out." : "");
  find("head").replaceChildren();
  columns.forEach((column, k) => {
    const head = make("th", find("head"), column.className, column.name);
    head.scope = "col";
    head.tabIndex = 0;
    head.setAttribute("aria-sort", state.sort !== k ? "none" : state.descending ? "descending" : "ascending");
    head.addEventListener("click", () => sortBy(k));
    head.addEventListener("keydown", (event) => { if (event.key === "Enter") sortBy(k); });
  });
  find("rows").replaceChildren();
  rows.slice(0, state.shown).forEach((row, number) => {
    // A group names its step and its prompt once.
    const above = view.grouped && state.sort === null ? rows[number - 1] : undefined;
    const sameGroup = above !== undefined && above.step === row.step && above.prompt === row.prompt;
    const line = make("tr", find("rows"), sameGroup ? "same-group" : "");
    line.tabIndex = 0;
    columns.forEach((column) => {
      const cell = make("td", line, column.className);
      const value = column.value(row);
      if (sameGroup && ["step", "prompt"].includes(column.name)) return;
      if (column.name === "prompt") fillText(cell, value);
      else if (column.name === "completion") {
        if (row.earlier) fillText(cell, texts[row.earlier.text], `step ${row.earlier.step}, reward ${numeral(row.earlier.total)}`);
        fillText(cell, value, row.earlier && `step ${row.step}, reward ${numeral(row.total)}`);
      } else if (column.name === "change") {
        cell.textContent = (value > 0 ? "+" : "") + numeral(value);
        cell.classList.add(value > 0 ? "up" : "down");
      } else cell.textContent = column.className.includes("step") ? value : value === null ? "-" : value.toFixed(2);
    });
    const toggle = () => { if (!String(getSelection())) line.classList.toggle("open"); };
    line.addEventListener("click", toggle);
    line.addEventListener("keydown", (event) => { if (event.key === "Enter") toggle(); });
  });
  for (const text of document.querySelectorAll("#rows .text")) text.classList.toggle("clipped", text.scrollHeight > text.clientHeight + 2);
  find("none").hidden = rows.length > 0;
  find("none").textContent = view.rows.length ? "Nothing matches the filter." : "Nothing to show in this view yet.";
  find("next").hidden = rows.length <= state.shown;
  find("next").textContent = `Show more (${rows.length - state.shown})`;
}

function sortBy(column) {
  state.descending = state.sort === column ? !state.descending : true;
  state.sort = column;
  showRows();
}

table.views.forEach((view, number) => {
  const button = make("button", find("views"), "", view.name);
  button.type = "button";
  button.setAttribute("aria-pressed", number === 0);
  button.addEventListener("click", () => {
    Object.assign(state, { view: number, sort: null, shown: PAGE });
    [...find("views").children].forEach((other) => other.setAttribute("aria-pressed", other === button));
    showRows();
  });
});
find("filter").addEventListener("input", (event) => { Object.assign(state, { filter: event.target.value, shown: PAGE }); showRows(); });
find("next").addEventListener("click", () => { state.shown += PAGE; showRows(); });
for (const id of ["completions", "completions-title"]) find(id).hidden = !table.views.length;
if (table.views.length) showRows();
