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
  if (token.step < 0) return `token ${position + 1}, given in advance`;
  if (token.step >= data.num_steps) return `token ${position + 1}, never denoised`;
  return `token ${position + 1}, step ${token.step + 1}, confidence ${token.confidence.toFixed(3)}, ` +
    `entropy ${token.entropy.toFixed(3)} nats`;
}

function showRow(number) {
  row = data.rows[number];
  find("prompt").textContent = row.prompt;
  find("prompt").hidden = !row.prompt;
  find("text").replaceChildren();
  find("canvas").replaceChildren();
  words = [];
  squares = [];
  blocks = [];
  row.tokens.forEach((token, position) => {
    while (blocks.length <= token.block) blocks.push(make("span", find("canvas")));
    const square = make("i", blocks[token.block]);
    square.title = tooltip(token, position);
    squares.push(square);
    if (token.after_end) return;
    const onlyLineEnds = token.text.replaceAll("\n", "") === "";
    const word = make("span", find("text"), onlyLineEnds ? "\u21b5" + token.text : token.text);
    word.title = square.title;
    words.push(word);
  });
  slider.max = row.steps.length - 1;
  showFrame(0);
}

function showFrame(index) {
  slider.value = index;
  const step = row.steps[index];
  let shown = 0, atWork = 0;
  row.tokens.forEach((token, position) => {
    const isShown = token.step <= step, isFresh = token.step === step && step >= 0;
    const look = token.step < 0 ? "given" : `l${levelOf(token.confidence)}`;
    shown += isShown;
    if (isFresh) atWork = token.block;
    squares[position].className = (isShown ? look : "") + (token.after_end ? " after-end" : "");
    if (words[position]) words[position].className = isShown ? look + (isFresh ? " fresh" : "") : "hidden";
  });
  blocks.forEach((block, number) => { block.className = number === atWork ? "at-work" : ""; });
  find("status").textContent = `step ${step + 1}/${data.num_steps}, block ` +
    `${atWork + 1}/${blocks.length}, ${shown}/${row.tokens.length} tokens`;
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
