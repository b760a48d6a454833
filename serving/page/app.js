// The page: fields, pictures, mask and server brought together.

import { Refused, draw, hasKey, readSettings, setKey, settings } from "./api.js";
import { Form } from "./form.js";
import { Entry, Gallery } from "./gallery.js";
import { MaskEditor } from "./mask.js";
import { begun } from "./source.js";

const $ = (id) => document.getElementById(id);
const PREVIEWS = 3; // of a picture, the most that the API gives
const AGAIN = 2000; // milliseconds between two looks whether the model is open

const form = new Form();
const gallery = new Gallery();
const mask = new MaskEditor();
let source = null; // the picture to begin with
let found = null; // the settings that it carries
let ending = null; // ends what is being drawn

async function begin() {
  try {
    const offered = await settings();
    form.offer(offered);
    $("entry").hidden = true;
    $("main").hidden = false;
    ready();
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    $("main").hidden = true;
    if (error.status === 401) {
      $("entry-error").textContent = hasKey() ? "This key is not known here." : "";
      setKey(null);
      $("entry").hidden = false;
      $("key").focus();
    } else {
      $("server").textContent = error.message;
      setTimeout(begin, AGAIN);
    }
  }
}

/** Say which model draws, and look again while it is being opened. */
function ready() {
  const model = form.model;
  $("server").textContent = model.ready ? model.name : `${model.name} is not open yet${model.why ? `: ${model.why}` : ""}.`;
  if (!model.ready) setTimeout(begin, AGAIN);
}

function fail(error) {
  $("error").textContent = error.message;
  form.wrong(error.param ?? null);
}

/** What those who do not see the page are told: seldom enough to be listened to. */
function say(text) {
  $("said").textContent = text;
}

async function submit() {
  $("error").textContent = "";
  form.wrong(null);
  let wanted;
  try {
    const shared = { ...form.fields(), n: 1, stream: true, partial_images: PREVIEWS, output_format: "png" };
    if (source !== null) shared.strength = Number($("strength").value);
    if (source !== null && !mask.empty) shared.feather = Number($("feather").value);
    wanted = form.seeds(form.count).map((seed) => new Entry({ ...shared, seed }));
  } catch (error) {
    if (!error.param) throw error;
    fail(error);
    return;
  }
  ending = new AbortController(); // before anything is waited for: a second click finds it
  drawing(true);
  gallery.add(wanted);
  const image = source?.blob ?? null;
  const where = image !== null && !mask.empty ? await mask.blob() : null;
  $("frame").scrollIntoView({ block: "nearest" });
  say("Drawing.");
  await Promise.all(wanted.map((entry) => one(entry, image, where, ending.signal)));
  const done = wanted.filter(({ state }) => state === "done").length;
  say(done === 0 ? "No picture was drawn." : done === 1 ? "The picture is finished." : `${done} pictures are finished.`);
  drawing(false);
}

/** Draw one picture, and keep its entry up to date. */
async function one(entry, image, where, signal) {
  const start = performance.now();
  const change = (fields) => {
    Object.assign(entry, fields);
    gallery.update(entry);
  };
  try {
    entry.blob = await draw(entry.fields, {
      image,
      mask: where,
      signal,
      seen(preview) {
        entry.show(preview);
        change({ state: "drawing" });
      },
      stepped: (step, steps) => {
        // Steps are finer than previews, so the larger share is the truer one.
        if (step / steps >= entry.share) change({ state: "drawing", share: step / steps, step: steps > PREVIEWS + 1 ? [step, steps] : entry.step });
      },
    });
    entry.show(entry.blob);
    change({ state: "done", seconds: (performance.now() - start) / 1000 });
  } catch (error) {
    if (error.name === "AbortError") {
      gallery.drop(entry);
    } else if (error instanceof Refused) {
      fail(error);
      gallery.drop(entry);
      if (error.status === 401) begin();
    } else {
      throw error;
    }
  }
}

function drawing(now) {
  const focused = document.activeElement === $("submit") || document.activeElement === $("cancel");
  $("submit").hidden = now;
  $("cancel").hidden = !now;
  if (focused) (now ? $("cancel") : $("submit")).focus();
  if (!now) ending = null;
}

function cancel() {
  ending?.abort();
}

/** Take a picture to begin with; where it carries settings, they are offered. */
async function take(file) {
  $("error").textContent = "";
  try {
    source = await begun(file);
  } catch (error) {
    fail(error);
    return;
  }
  found = null;
  mask.begin(source.bitmap);
  showSource();
  const own = source;
  try {
    const carried = await readSettings(file);
    if (carried !== null && source === own) {
      found = carried;
      $("found-text").textContent = `It carries the settings that made it: “${carried.prompt || "no prompt"}”.`;
      $("found").hidden = false;
    }
  } catch (error) {
    if (!(error instanceof Refused)) throw error; // a picture without settings is as good
  }
}

function remove() {
  if (source !== null) URL.revokeObjectURL(source.url);
  source = found = null;
  mask.begin(null);
  showSource();
  $("choose").focus();
}

function showSource() {
  $("begun").hidden = source === null;
  $("choose").hidden = source !== null;
  $("found").hidden = found === null;
  if (source !== null) {
    $("source").src = source.url;
    $("source-name").textContent = `${source.name}, ${source.bitmap.width} × ${source.bitmap.height}`;
  }
  form.begin(source === null ? null : source.bitmap);
  showMask();
}

function showMask() {
  const painted = source !== null && !mask.empty;
  $("feather-field").hidden = !painted;
  $("paint").textContent = painted ? "Change the mask" : "Paint a mask";
}

function pictureIn(transfer) {
  return [...(transfer?.files ?? [])].find((file) => file.type.startsWith("image/")) ?? null;
}

$("draw").addEventListener("submit", (event) => {
  event.preventDefault();
  if (ending === null) submit();
});
$("cancel").addEventListener("click", cancel);
$("entry").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey($("key").value.trim());
  begin();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !$("mask").open) $("draw").requestSubmit();
  if (event.key === "Escape" && !$("mask").open) cancel();
});

$("choose").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", () => {
  if ($("file").files.length) take($("file").files[0]);
  $("file").value = "";
});
$("remove").addEventListener("click", remove);
$("paint").addEventListener("click", () => mask.open(() => {
  showMask();
  $("paint").focus();
}));
$("use-found").addEventListener("click", () => {
  const carried = found;
  remove();
  form.use(carried);
  $("prompt").focus();
});
$("use-seed").addEventListener("click", () => {
  form.seed(gallery.current.fields.seed);
  say("The next picture has this seed.");
});
$("use-picture").addEventListener("click", () => {
  take(new File([gallery.current.blob], $("download").download, { type: gallery.current.blob.type }));
  $("start").scrollIntoView({ block: "nearest" });
});
$("model").addEventListener("change", ready);

let over = 0; // elements under the pointer that a file is being dragged into
document.addEventListener("dragenter", (event) => {
  if (event.dataTransfer?.types.includes("Files")) document.body.classList.toggle("over", ++over > 0);
});
document.addEventListener("dragleave", () => {
  over = Math.max(0, over - 1);
  document.body.classList.toggle("over", over > 0);
});
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => {
  event.preventDefault();
  over = 0;
  document.body.classList.remove("over");
  const picture = pictureIn(event.dataTransfer);
  if (picture) take(picture);
  else if (event.dataTransfer?.files.length) fail(new Error("That is not a picture. PNG, JPEG and WebP are."));
});
document.addEventListener("paste", (event) => {
  const picture = pictureIn(event.clipboardData);
  if (picture) {
    event.preventDefault();
    take(picture);
  }
});

begin();
