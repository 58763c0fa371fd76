"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const find = (id) => document.getElementById(id);
const make = (tag, parent, text) => {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  parent.append(node);
  return node;
};
const slider = find("slider");
let row, words, squares, blocks, timer = null;

const levelOf = (confidence) => data.levels.filter((bound) => confidence >= bound).length;

function tooltip(token, position) {
  if (token === null) return `token ${position + 1}, hidden`;
  if (token.step < 0) return `token ${position + 1}, given in advance`;
  return `token ${position + 1}, step ${token.step + 1}, confidence ${token.confidence.toFixed(3)}, ` +
    `entropy ${token.entropy.toFixed(3)} nats` + (token.earlier ? `; earlier: ${token.earlier.map((text) => JSON.stringify(text)).join(", ")}` : "");
}

function showRow(number) {
  row = data.rows[number];
  find("prompt").textContent = row.prompt;
  find("prompt").hidden = !row.prompt;
  find("text").replaceChildren();
  find("canvas").replaceChildren();
  blocks = [];
  words = [];
  squares = [];
  for (let position = 0; position < row.length; position += 1) {
    if (position % row.block_length === 0) blocks.push(make("span", find("canvas")));
    squares.push(make("i", blocks.at(-1)));
    words.push(make("span", find("text")));
  }
  slider.max = row.steps.length - 1;
  showFrame(0);
}

// The canvas after the frame of this number: what is hidden is null, and has no text and no width of its own.
function canvasAt(index) {
  const tokens = Array(row.length).fill(null);
  for (const { changes } of row.steps.slice(0, index + 1)) for (const [position, token] of changes) tokens[position] = token;
  return tokens;
}

function showFrame(index) {
  slider.value = index;
  const { step, block, changes } = row.steps[index], tokens = canvasAt(index);
  const end = tokens.findIndex((token) => token?.ends), length = end < 0 ? tokens.length : end + 1;
  const rehidden = new Set(changes.filter((change) => change[1] === null).map((change) => change[0]));
  tokens.forEach((token, position) => {
    const look = token === null ? "" : token.step < 0 ? "given" : `l${levelOf(token.confidence)}`;
    const word = words[position], text = token?.text ?? "";
    squares[position].className = look + (position >= length ? " after-end" : "");
    word.hidden = position >= length;
    word.textContent = position >= length ? "" : token !== null && text.replaceAll("\n", "") === "" ? "\u21b5" + text : text;
    word.className = token === null ? "hidden" + (rehidden.has(position) ? " again" : "")
      : look + (token.step === step && step >= 0 ? " fresh" : "") + (token.earlier ? " rewritten" : "");
    squares[position].title = word.title = tooltip(token, position);
  });
  blocks.forEach((part, number) => { part.className = number === block ? "at-work" : ""; });
  find("status").textContent = `step ${step + 1}/${data.num_steps}, block ${block + 1}/${blocks.length}, ` +
    `${tokens.filter((token) => token !== null).length}/${tokens.length} tokens`;
}

function pause() {
  clearInterval(timer);
  timer = null;
  find("play").textContent = "Play";
}

function play() {
  if (Number(slider.value) >= Number(slider.max)) showFrame(0);
  find("play").textContent = "Pause";
  timer = setInterval(() => {
    if (Number(slider.value) >= Number(slider.max)) pause();
    else showFrame(Number(slider.value) + 1);
  }, 1000 / Number(find("speed").value));
}

function go(index) {
  pause();
  showFrame(Math.max(0, Math.min(Number(slider.max), index)));
}

const toggle = () => (timer === null ? play() : pause());
find("play").addEventListener("click", toggle);
slider.addEventListener("input", () => go(Number(slider.value)));
find("speed").addEventListener("change", () => { if (timer !== null) { pause(); play(); } });
find("row").addEventListener("change", (event) => { pause(); showRow(Number(event.target.value)); });
document.addEventListener("keydown", (event) => {
  if (event.target.tagName === "SELECT" || event.ctrlKey || event.metaKey || event.altKey) return;
  const now = Number(slider.value);
  const moves = { ArrowLeft: now - 1, ArrowRight: now + 1, Home: 0, End: Number(slider.max) };
  if (event.key in moves) go(moves[event.key]);
  else if (event.key === " " && event.target.tagName !== "BUTTON") toggle();
  else return;
  event.preventDefault();
});

data.rows.forEach((_, number) => { make("option", find("row"), `${number + 1} of ${data.rows.length}`).value = number; });
find("row-choice").hidden = data.rows.length < 2;
make("span", find("legend"), "Confidence");
[...data.levels.map((bound) => `< ${bound}`), `${data.levels.at(-1)} to 1`].forEach((label, level) => {
  const entry = make("span", find("legend"));
  make("b", entry).style.background = `var(--h${level})`;
  entry.append(label);
});
showRow(0);
