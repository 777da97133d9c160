"use strict";
// Everything from the run or the user enters the page as text, never as HTML.
const find = (id) => document.getElementById(id);
const made = (tag, className = "", text = "") => {
  const element = document.createElement(tag);
  element.className = className;
  element.textContent = text;
  return element;
};
const percent = (fraction) => (fraction === null ? "–" : (100 * fraction).toFixed(1) + " %");
let run = null;

// --- a pasted question ---------------------------------------------------------------------------

// The ways a list of options is marked; a letter in the stem ("vitamin A.") is no list by itself.
const STYLES = [/\(([A-Ea-e1-5])\)/g, /([A-Ea-e1-5])\)/g, /([A-Ea-e1-5])\./g, /([A-Ea-e1-5]):/g];
const ROWS = ["ABCDE", "abcde", "12345"];

// Stem and options of a text such as "stem A) one B) two C) three D) four"; null if it has none.
function split(text, count) {
  for (const style of STYLES) {
    for (const row of ROWS) {
      const marks = [...text.matchAll(style)].filter(
        (mark) => row.includes(mark[1]) && (mark.index === 0 || /[\s,;]/.test(text[mark.index - 1])),
      );
      for (let first = marks.length - count; first >= 0; first--) {
        const list = marks.slice(first, first + count);
        if (list.map((mark) => mark[1]).join("") !== row.slice(0, count)) continue;
        const stem = text.slice(0, list[0].index).trim();
        const options = list.map((mark, place) => {
          const end = place + 1 < count ? list[place + 1].index : text.length;
          return tidy(text.slice(mark.index + mark[0].length, end), place + 1 === count);
        });
        if (stem && options.every(Boolean)) return { stem, options };
      }
    }
  }
  return null;
}

function tidy(option, isLast) {
  // A solution that was copied along must not become part of the last option.
  const text = isLast ? option.split(/\n\s*\n|\n\s*(?:ans(?:wer)?|correct|exp)\b/i)[0] : option;
  return text.trim().replace(/[,;]$/, "").replace(/\s+/g, " ");
}

function takeApart() {
  const parts = run && split(find("question").value, run.letters.length);
  if (!parts) return;
  find("question").value = parts.stem;
  inputs().forEach((input, place) => (input.value = parts.options[place]));
}

// --- the form ------------------------------------------------------------------------------------

const inputs = () => [...document.querySelectorAll("#options input")];

function showRun() {
  const scored = run.split ? ", scored on " + run.split : ", not scored";
  find("run").textContent = `Run ${run.name}: ${run.base}, ${run.method}, trained on ${run.data}${scored}`;
  if (run.status !== "completed") find("run").textContent += ` (${run.status})`;
  document.querySelector("#disclaimer span").textContent = run.disclaimer;
  for (const letter of run.letters) {
    const row = made("div", "option");
    const label = made("label", "", letter);
    const input = made("input");
    input.id = label.htmlFor = "option-" + letter;
    input.type = "text";
    input.autocomplete = "off";
    input.setAttribute("aria-label", "Option " + letter);
    row.append(label, input);
    find("options").append(row);
  }
  for (const name of Object.keys(run.subjects)) find("subject").append(new Option(name, name));
  showTrust();
}

function showTrust() {
  const body = document.querySelector("#trust tbody");
  const subject = find("subject").value;
  body.replaceChildren();
  if (subject) addRow(body, subject, run.subjects[subject]);
  if (run.overall) addRow(body, "all of " + run.split, run.overall);
  find("trust").hidden = !run.overall;
}

function addRow(body, name, group) {
  const row = made("tr");
  const head = made("th", "", name);
  head.scope = "row";
  const interval = group.ci_low === null ? "–" : `[${(100 * group.ci_low).toFixed(1)}, ${(100 * group.ci_high).toFixed(1)}]`;
  row.append(head, ...[percent(group.accuracy), interval, percent(group.majority_accuracy), group.n].map((text) => made("td", "", text)));
  body.append(row);
}

function problem(text) {
  find("problem").textContent = text;
  find("problem").hidden = !text;
}

function firstEmpty() {
  const fields = [find("question"), ...inputs()];
  for (const field of fields) field.setAttribute("aria-invalid", String(!field.value.trim()));
  return fields.find((field) => !field.value.trim());
}

// --- asking --------------------------------------------------------------------------------------

async function fetchJson(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Error("The server does not answer: is it still running?");
  }
  const value = await response.json().catch(() => ({ error: `The server answered ${response.status}.` }));
  if (!response.ok) throw new Error(value.error);
  return value;
}

async function ask() {
  takeApart();
  problem("");
  const empty = firstEmpty();
  if (empty) {
    const name = empty.id === "question" ? "The question" : "Option " + empty.id.slice(-1);
    problem(name + " is empty.");
    empty.focus();
    return;
  }
  const question = { question: find("question").value };
  inputs().forEach((input, place) => (question["op" + "abcde"[place]] = input.value));
  if (find("subject").value) question.subject_name = find("subject").value;
  const button = document.querySelector("button[type=submit]");
  button.disabled = true;
  try {
    const answer = await fetchJson("predict", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(question),
    });
    showAnswer(answer, inputs().map((input) => input.value));
  } catch (error) {
    find("result").hidden = true;
    problem(error.message);
  } finally {
    button.disabled = false;
  }
}

function showAnswer(answer, options) {
  const bars = find("bars");
  bars.replaceChildren();
  for (const [place, letter] of run.letters.entries()) {
    const probability = answer.probabilities[letter];
    const item = made("li");
    const line = made("div", "line");
    line.append(made("b", "", letter), made("span", "text", options[place]));
    if (letter === answer.prediction) {
      item.className = "chosen";
      line.append(made("span", "mark", "likeliest"));
    }
    line.append(made("span", "number", percent(probability)));
    const track = made("div", "track");
    track.setAttribute("aria-hidden", "true"); // the number says the same
    const fill = made("div", "fill");
    fill.style.width = 100 * probability + "%";
    track.append(fill);
    item.append(line, track);
    bars.append(item);
  }
  const shortened = answer.shortened
    ? "The question was too long: the beginning of its stem was not read. "
    : "";
  find("calibration").textContent =
    shortened +
    (run.temperature === null
      ? "As scored, not calibrated. These are the model's probabilities, not a patient's."
      : `Calibrated with the run's temperature, ${run.temperature.toFixed(2)}, fitted on its val questions. These are the model's probabilities, not a patient's.`);
  find("result").hidden = false;
}

find("question").addEventListener("paste", () => setTimeout(takeApart));
find("subject").addEventListener("change", showTrust);
find("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
find("ask").addEventListener("reset", () => {
  problem("");
  find("result").hidden = true;
  setTimeout(() => {
    showTrust();
    for (const field of [find("question"), ...inputs()]) field.removeAttribute("aria-invalid");
    find("question").focus();
  });
});
find("ask").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    ask();
  }
});
fetchJson("run")
  .then((value) => {
    run = value;
    showRun();
  })
  .catch((error) => problem(error.message));
