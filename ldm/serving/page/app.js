// The page: the form, the images as they appear, and what can be done with each.

import { asBlob, draw, model, models, recipeOf, ServerError, setKey } from "./api.js";
import { Editor } from "./editor.js";
import * as history from "./history.js";
import { Known } from "./known.js";

const $ = (id) => document.getElementById(id);
const FIELDS = ["negative", "steps", "guidance", "sampler", "size", "model", "seed"];
const editor = new Editor($("canvas"), $("canvas-hint"));
const known = new Map(); // models by id
const nouns = new Known($("known"), addToPrompt);
let running = null; // the AbortController of the request in work
const narrow = matchMedia("(max-width: 52rem)");
let waitingFor = null; // what needs the key

const mode = () => document.querySelector("input[name=mode]:checked").value;
const say = (text) => { $("status").textContent = text; };

function complain(error) {
  $("error").textContent = error ? error.message : "";
  $("note").textContent = "";
  document.querySelectorAll("[aria-invalid]").forEach((each) => each.removeAttribute("aria-invalid"));
  const field = error && error.param && $({ negative_prompt: "negative" }[error.param] || error.param);
  if (field && field.closest("form")) {
    field.setAttribute("aria-invalid", "true");
    if (field.closest("details")) field.closest("details").open = true;
    field.focus();
  }
  if (error && error.status === 401) {
    $("key-row").hidden = false;
    $("key").focus();
  }
}

// Models and settings

function fill(select, values, chosen) {
  select.replaceChildren(...values.map((value) => new Option(value, value, value === chosen, value === chosen)));
}

function useModel(id, settings = {}) {
  const about = known.get(id).ldm;
  $("model").value = id;
  const size = settings.size || about.size;
  fill($("size"), about.sizes.includes(size) ? about.sizes : [...about.sizes, size], size);
  const sampler = about.samplers.includes(settings.sampler) ? settings.sampler : about.sampler;
  fill($("sampler"), about.samplers, sampler);
  $("steps").value = settings.steps ?? about.steps;
  $("guidance").value = settings.guidance ?? about.guidance;
  for (const name of ["steps", "sampler"]) $(name).disabled = about[name] === null; // of models without a sampler
  showNouns(id);
}

// A model that is not in memory has no nouns yet.
async function showNouns(id) {
  const about = known.get(id).ldm;
  try {
    if (!about.nouns) Object.assign(about, (await model(id)).ldm);
  } catch { /* the list is a convenience */ }
  if ($("model").value === id) nouns.show(about);
}

function addToPrompt(noun) {
  const before = $("prompt").value.trimEnd();
  $("prompt").value = before ? `${before} ${noun}` : noun;
  say(`${noun} is added to the prompt.`);
}

async function start() {
  try {
    const list = await models();
    for (const model of list) known.set(model.id, model);
    fill($("model"), list.map((model) => model.id), list[0].id);
    useModel(list[0].id);
    complain(null);
    say("");
  } catch (error) {
    waitingFor = start;
    complain(error);
  }
}

function settings() {
  const found = Object.fromEntries(FIELDS.map((name) => [name, $(name).value]));
  return { ...found, prompt: $("prompt").value };
}

function restore(found) {
  if (known.size) useModel(known.has(found.model) ? found.model : known.keys().next().value, found);
  $("prompt").value = found.prompt || "";
  $("negative").value = found.negative || "";
  $("seed").value = found.seed ?? "";
  $("settings").open = true;
}

// What the form shows of a recipe in an image.
function ofRecipe(recipe) {
  const index = recipe.index || 0;
  const seed = Array.isArray(recipe.seed) ? recipe.seed[index] : recipe.seed;
  const text = (value) => (Array.isArray(value) ? value[index] : value);
  return {
    model: recipe.model, prompt: text(recipe.prompt), negative: text(recipe.negative), seed,
    steps: recipe.steps, guidance: recipe.guidance, sampler: recipe.sampler,
    size: recipe.width && recipe.height ? `${recipe.width}x${recipe.height}` : undefined,
  };
}

async function dropped(blob, asSource) {
  if (!blob || !blob.type.startsWith("image/")) return complain(new Error("Expected an image file."));
  complain(null);
  try {
    const recipe = asSource ? null : await recipeOf(blob);
    if (recipe) {
      restore(ofRecipe(recipe));
      say("The settings of the image are restored.");
      showOne(blob, settings());
      $("prompt").focus();
    } else {
      await edit(blob, "change");
    }
  } catch (error) {
    complain(error instanceof ServerError ? error : new Error("The image cannot be read."));
  }
}

async function edit(blob, how) {
  await editor.load(blob);
  $("editor").hidden = false;
  document.querySelector(`input[name=mode][value=${how}]`).checked = true;
  useMode();
  say("This image is the start of the next ones.");
  $("canvas").focus();
}

function useMode() {
  const now = mode();
  editor.setMode(now);
  $("strength-row").hidden = now === "paint" || now === "extend";
  $("paint-row").hidden = now !== "paint";
  $("extend-row").hidden = now !== "extend";
  $("prompt").required = now !== "vary" || $("editor").hidden;
  $("size").disabled = !$("editor").hidden;
}

// The images

function card(i, count, settings) {
  const item = document.createElement("li");
  const figure = document.createElement("figure");
  const frame = document.createElement("div");
  frame.className = "frame busy";
  const [w, h] = (settings.size || "1x1").split("x");
  frame.style.aspectRatio = `${w} / ${h}`;
  frame.textContent = "waiting";
  figure.append(frame, document.createElement("figcaption"));
  item.append(figure);
  item.setAttribute("aria-label", `Image ${i + 1} of ${count}`);
  return item;
}

function paint(item, blob, alt) {
  const frame = item.querySelector(".frame");
  const old = frame.querySelector("img");
  const image = old || document.createElement("img");
  if (old) URL.revokeObjectURL(old.src);
  image.src = URL.createObjectURL(blob);
  image.alt = alt;
  if (!old) frame.replaceChildren(image);
}

function finish(item, blob, seed, settings) {
  item.querySelector(".frame").classList.remove("busy");
  paint(item, blob, `${settings.prompt || "variation"}, seed ${seed}`);
  item.querySelector("img").onload = (event) => {
    item.querySelector(".frame").style.aspectRatio = `${event.target.naturalWidth} / ${event.target.naturalHeight}`;
  };
  const label = document.createElement("span");
  label.textContent = `Seed ${seed}`;
  const make = (text, action) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = text;
    button.setAttribute("aria-label", `${text}, image with seed ${seed}`);
    button.onclick = action;
    return button;
  };
  const kind = blob.type === "image/jpeg" ? "jpg" : blob.type.split("/")[1];
  item.querySelector("figcaption").replaceChildren(
    label,
    make("Variations", async () => { await edit(blob, "vary"); $("form").requestSubmit(); }),
    make("Edit", () => edit(blob, "paint")),
    make("Reuse seed", () => {
      $("seed").value = seed;
      $("settings").open = true;
      $("seed").focus();
    }),
    make("Download", () => {
      const link = document.createElement("a");
      link.href = URL.createObjectURL(blob);
      link.download = `${(settings.prompt || "variation").replace(/[^\w-]+/g, "-").slice(0, 40)}-${seed}.${kind}`;
      link.click();
    }),
  );
}

function showOne(blob, settings) {
  const item = card(0, 1, settings);
  $("images").className = "one";
  $("images").replaceChildren(item);
  $("welcome").hidden = true;
  finish(item, blob, settings.seed, settings);
}

function requestFields(now, source) {
  const fields = {
    prompt: now.prompt, negative_prompt: now.negative, n: Number($("n").value),
    guidance: Number(now.guidance), model: now.model,
  };
  if (!$("steps").disabled) Object.assign(fields, { steps: Number(now.steps), sampler: now.sampler });
  if (now.seed !== "") fields.seed = Number(now.seed);
  if (!source) fields.size = now.size;
  else if (mode() === "change" || mode() === "vary") fields.strength = Number($("strength").value);
  return fields;
}

function timeLeft(event, begun) {
  const left = (performance.now() - begun) / event.step * (event.steps - event.step) / 1000;
  const time = left < 90 ? `${Math.ceil(left)} s` : `${Math.ceil(left / 60)} min`;
  return `step ${event.step} of ${event.steps}, ${event.step === event.steps ? "finishing" : `about ${time} left`}`;
}

async function generate() {
  const source = !$("editor").hidden;
  const now = { ...settings(), ...(source ? { size: `${editor.canvas.width}x${editor.canvas.height}` } : {}) };
  const count = Number($("n").value);
  complain(null);
  let files = {};
  try {
    if (source) files = await editor.files();
  } catch (error) {
    return complain(error);
  }
  const items = Array.from({ length: count }, (_, i) => card(i, count, now));
  $("images").className = count === 1 ? "one" : "";
  $("images").replaceChildren(...items);
  $("welcome").hidden = true;
  busy(new AbortController());
  if (narrow.matches) $("results").scrollIntoView();
  say("Waiting for the server.");
  let begun = 0;
  let done = 0;
  const entries = [];
  const endpoint = source ? (mode() === "vary" ? "variations" : "edits") : "generations";
  try {
    await draw(endpoint, requestFields(now, source), files, running.signal, (event) => {
      if (event.type === "progress") {
        if (!begun) say("Generating.");
        begun = begun || performance.now() - 1;
        $("progress").value = event.step / event.steps;
        $("left-text").textContent = event.step > 1 || event.steps === 1 ? timeLeft(event, begun) : `step 1 of ${event.steps}`;
      } else if (event.b64_json) {
        const blob = asBlob(event.b64_json, `image/${event.output_format}`);
        if (event.type.endsWith(".completed")) {
          finish(items[event.index], blob, event.seed, now);
          entries.push({ blob, seed: event.seed, settings: { ...now, seed: event.seed } });
          done += 1;
          if (event.warnings) $("note").textContent = event.warnings.join(" ");
        } else {
          paint(items[event.index], blob, `unfinished image ${event.index + 1}`);
        }
      }
    });
    if (!done) throw new ServerError(0, { message: "The server ended the request without an image." });
    say(`${done} ${done === 1 ? "image is" : "images are"} ready.`);
    if ($("known").hidden) showNouns(now.model);
    for (const entry of entries.reverse()) await history.add(entry);
    await showHistory();
  } catch (error) {
    if (error.name === "AbortError") say("Cancelled.");
    else {
      say("");
      waitingFor = error.status === 401 ? generate : null;
      complain(error);
    }
    for (const item of items) item.querySelector(".frame").classList.remove("busy");
    if (!done && !document.querySelector("#images img")) {
      $("images").replaceChildren();
      $("welcome").hidden = false;
    }
  } finally {
    busy(null);
  }
}

function busy(controller) {
  running = controller;
  $("generate").disabled = Boolean(controller);
  $("cancel").disabled = !controller;
  $("progress-row").hidden = !controller;
  $("progress").value = 0;
  $("left-text").textContent = "";
}

// The history

async function showHistory() {
  const entries = await history.all();
  $("history-section").hidden = !entries.length;
  $("history").replaceChildren(...entries.map((entry) => {
    const item = document.createElement("li");
    const button = document.createElement("button");
    const image = document.createElement("img");
    image.src = URL.createObjectURL(entry.blob);
    image.alt = `${entry.settings.prompt || "variation"}, seed ${entry.seed}`;
    image.loading = "lazy";
    image.onload = () => URL.revokeObjectURL(image.src);
    button.type = "button";
    button.append(image);
    button.onclick = () => {
      restore(entry.settings);
      showOne(entry.blob, entry.settings);
      say("The image and its settings are shown again.");
      $("results").focus();
    };
    item.append(button);
    return item;
  }));
}

// Events

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!running) generate();
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("form").requestSubmit();
  }
});
$("cancel").addEventListener("click", () => running && running.abort());
document.addEventListener("keydown", (event) => { if (event.key === "Escape" && running) running.abort(); });
$("key").addEventListener("change", () => {
  setKey($("key").value);
  if (waitingFor) waitingFor();
});
$("model").addEventListener("change", () => useModel($("model").value));
$("file").addEventListener("change", (event) => { dropped(event.target.files[0], false); event.target.value = ""; });
$("strength").addEventListener("input", () => { $("strength-value").textContent = Number($("strength").value).toFixed(2); });
$("brush").addEventListener("input", () => { editor.brush = Number($("brush").value); editor.show(); });
$("undo").addEventListener("click", () => editor.undo());
$("clear").addEventListener("click", () => editor.clear());
$("remove").addEventListener("click", () => {
  editor.remove();
  $("editor").hidden = true;
  useMode();
  $("file").focus();
});
document.querySelectorAll("input[name=mode]").forEach((each) => each.addEventListener("change", useMode));
for (const side of ["left", "right", "top", "bottom"]) {
  $(side).addEventListener("input", () => editor.setMargins({ [side]: Math.min(1024, Math.max(0, Math.round(Number($(side).value) || 0))) }));
}
editor.onmargins = (margins) => { for (const [side, value] of Object.entries(margins)) $(side).value = value; };
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("over");
  $("drop").classList.toggle("over", $("drop").contains(event.target));
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("over");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("over");
  $("drop").classList.remove("over");
  dropped(event.dataTransfer.files[0], $("source").contains(event.target));
});
document.addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) dropped(event.clipboardData.files[0], false);
});
$("forget").addEventListener("click", async () => {
  await history.clear();
  await showHistory();
  say("The history is cleared.");
  $("prompt").focus();
});

if (narrow.matches) $("settings").open = false;
useMode();
start();
showHistory();
$("prompt").focus();
