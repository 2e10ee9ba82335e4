// What the pages do beyond links and forms: photos that are dropped, pasted or taken, and progress.
// Everything that is shown of a name or a file is text, or was escaped by the service.
"use strict";

document.documentElement.classList.add("scripted");

const one = (selector, within = document) => within.querySelector(selector);
const all = (selector, within = document) => [...within.querySelectorAll(selector)];
const formToken = () => one('meta[name="form-token"]').content;

document.addEventListener("htmx:configRequest", (event) => {
  event.detail.headers["X-Form-Token"] = formToken();
});

// What changed without a new page, in a few words for those who do not see it.
document.addEventListener("htmx:afterSettle", (event) => {
  const said = one("[data-said]");
  if (!said) return;
  if (event.detail.target.id === "doubts") {
    doubtShown(event.detail.target, said);
    return;
  }
  if (event.detail.target.id === "answers") {
    const names = all("article.face h2").map((each) => each.textContent);
    said.textContent = names.length ? `${names.length === 1 ? "1 face" : `${names.length} faces`}: ${names.join(", ")}` : "";
  } else if (event.detail.target.id === "wall") {
    const found = all("#wall .person").length;
    said.textContent = found === 1 ? "1 person" : `${found} people`;
  }
});

// Photos that are gone or cannot be decoded any more, and those that the service was too busy to show at once.
const ATTEMPTS = 20;
const WAIT_MS = 1000;
const isBusy = (response) => response.status === 429 || response.status === 503;
const wait = () => new Promise((resolve) => setTimeout(resolve, WAIT_MS));

async function photoAgain(image) {
  for (let attempt = 1; attempt <= ATTEMPTS; attempt += 1) {
    const response = await fetch(image.src).catch(() => null);
    if (!response || (!response.ok && !isBusy(response))) break;
    if (response.ok) {
      image.src = URL.createObjectURL(await response.blob());
      return;
    }
    await wait();
  }
  const gone = document.createElement("span");
  gone.className = "gone";
  gone.textContent = "photo moved or changed";
  image.replaceWith(gone);
}

const PHOTO = 'img[src^="/v1/thumbnails/"]';
document.addEventListener("error", (event) => {
  if (event.target.matches && event.target.matches(PHOTO)) photoAgain(event.target);
}, true);
// Those that failed before this script ran.
for (const image of document.querySelectorAll(PHOTO)) {
  if (image.complete && !image.naturalWidth) photoAgain(image);
}

// Search: one photo, given in any way, is the file of the form, which is then sent.
function ask(form, file) {
  const input = one('input[type="file"]', form);
  const carrier = new DataTransfer();
  carrier.items.add(file);
  input.files = carrier.files;
  form.requestSubmit();
}

function setUpSearch(form) {
  const input = one('input[type="file"]', form);
  input.addEventListener("change", () => {
    if (input.files.length) form.requestSubmit();
  });
  document.addEventListener("paste", (event) => {
    const file = [...event.clipboardData.files].find((each) => each.type.startsWith("image/"));
    if (file) ask(form, file);
  });
  const answers = one("#answers");
  const sent = new WeakMap(); // the photo of each request: a later one may replace it before it is answered
  let shown = null; // the photo of the answers that are shown, which the service does not keep
  form.addEventListener("htmx:beforeRequest", (event) => {
    sent.set(event.detail.xhr, input.files[0]);
    answers.setAttribute("aria-busy", "true");
  });
  setUpFaces(answers, () => shown);
  form.addEventListener("htmx:afterRequest", (event) => {
    if (event.detail.successful) shown = sent.get(event.detail.xhr);
    answers.removeAttribute("aria-busy");
    // So that the same photo can be chosen again; but not one that was chosen meanwhile, which is sent next.
    if (input.files[0] === sent.get(event.detail.xhr)) input.value = "";
    document.body.classList.toggle("answered", Boolean(one(".answer", answers)));
  });
  for (const failed of ["htmx:sendError", "htmx:timeout"]) {
    form.addEventListener(failed, () => answers.replaceChildren(noAnswer()));
  }
  setUpCamera(form, one("#camera"));
}

function noAnswer() {
  const note = document.createElement("p");
  note.className = "note problem";
  note.setAttribute("role", "alert");
  note.textContent = "The service does not answer; is it still running?";
  return note;
}

// Faces of an answer that are enrolled from their cards: the photo is sent once more, with the name.
function setUpFaces(answers, photo) {
  answers.addEventListener("htmx:configRequest", (event) => {
    if (event.target.matches("[data-with-photo]")) event.detail.formData.set("image", photo());
  });
  // A refusal does not take the place of the field, in which the name can be mended.
  answers.addEventListener("htmx:beforeSwap", (event) => {
    const card = event.detail.target;
    if (card.matches(".enroll-face") && event.detail.xhr.status >= 400) event.detail.target = one("[data-problem]", card);
  });
  answers.addEventListener("htmx:afterSettle", (event) => {
    const done = event.detail.target.matches(".enroll-face") && one("[data-focus]", event.detail.target);
    if (done) done.focus();
  });
  for (const failed of ["htmx:sendError", "htmx:timeout"]) {
    answers.addEventListener(failed, (event) => {
      const card = event.target.closest(".enroll-face");
      if (card) one("[data-problem]", card).replaceChildren(noAnswer());
    });
  }
}

function setUpCamera(form, dialog) {
  const button = one("[data-camera]", form);
  if (!navigator.mediaDevices) return; // a browser lends the camera to https and to localhost alone
  button.hidden = false;
  const video = one("video", dialog);
  const problem = one(".problem", dialog);
  button.addEventListener("click", async () => {
    problem.hidden = true;
    dialog.showModal();
    try {
      video.srcObject = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "user" }, audio: false });
      if (!dialog.open) stop();
    } catch {
      problem.textContent = "The browser gives no camera to this page; choose a photo instead.";
      problem.hidden = false;
    }
  });
  const stop = () => {
    for (const track of video.srcObject ? video.srcObject.getTracks() : []) track.stop();
    video.srcObject = null;
  };
  dialog.addEventListener("close", stop);
  one("[data-close]", dialog).addEventListener("click", () => dialog.close());
  one("[data-shoot]", dialog).addEventListener("click", () => {
    if (!video.videoWidth) return;
    const canvas = document.createElement("canvas");
    canvas.width = video.videoWidth;
    canvas.height = video.videoHeight;
    canvas.getContext("2d").drawImage(video, 0, 0);
    canvas.toBlob((blob) => {
      dialog.close();
      ask(form, new File([blob], "camera.jpg", { type: "image/jpeg" }));
    }, "image/jpeg", 0.92);
  });
}

// Dropping: the whole window takes it, so that a photo that is dropped beside the field does not replace the page.
function setUpDrop(field, take) {
  let depth = 0;
  const hasFiles = (event) => event.dataTransfer && [...event.dataTransfer.types].includes("Files");
  document.addEventListener("dragenter", (event) => {
    if (hasFiles(event)) { depth += 1; field.classList.add("over"); }
  });
  document.addEventListener("dragleave", () => {
    depth = Math.max(0, depth - 1);
    if (!depth) field.classList.remove("over");
  });
  document.addEventListener("dragover", (event) => { if (hasFiles(event)) event.preventDefault(); });
  document.addEventListener("drop", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    depth = 0;
    field.classList.remove("over");
    take(event.dataTransfer);
  });
}

// Enrollment: a request for each photo, a few at a time; each is durable when it is answered.
const AT_A_TIME = 4;

// Returns {file, path} of all files that were dropped, those of folders too.
async function droppedFiles(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry && item.webkitGetAsEntry()).filter(Boolean);
  if (!entries.length) return [...transfer.files].map((file) => ({ file, path: file.name }));
  const found = [];
  const visit = async (entry, path) => {
    if (entry.isFile) {
      found.push({ file: await new Promise((resolve, reject) => entry.file(resolve, reject)), path: path + entry.name });
      return;
    }
    const reader = entry.createReader();
    for (;;) {
      const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
      if (!some.length) return;
      for (const inner of some) await visit(inner, `${path}${entry.name}/`);
    }
  };
  for (const entry of entries) await visit(entry, "");
  return found;
}

function setUpEnroll(form) {
  const section = one("#sent");
  const state = { waiting: [], running: 0, total: 0, done: 0, counts: {}, rejected: [], stopped: false };
  const problem = one("[data-problem]", form);

  const isPhoto = ({ file, path }) => !path.split("/").some((part) => part.startsWith(".")) &&
    (file.type.startsWith("image/") || /\.(jpe?g|png|webp|heic|heif|avif|tiff?|bmp|gif|pgm)$/i.test(path));

  function say(text) {
    problem.textContent = text;
    problem.hidden = !text;
  }

  function add(files) {
    const name = one('input[name="identity"]', form).value.trim();
    const photos = files.filter(isPhoto).map((each) => ({ ...each, name: name || each.path.split("/").at(-2) || "" }));
    if (!photos.length) { say("There is no photo in that."); return; }
    if (photos.some((each) => !each.name)) {
      say("Type whose the photos are first, or give a folder that has their name.");
      one('input[name="identity"]', form).focus();
      return;
    }
    say("");
    state.total += photos.length;
    state.waiting.push(...photos);
    state.stopped = false;
    section.hidden = false;
    show();
    while (state.running < AT_A_TIME && state.waiting.length) work();
  }

  async function work() {
    state.running += 1;
    while (state.waiting.length) await send(state.waiting.shift());
    state.running -= 1;
    show();
  }

  async function send(photo) {
    if (photo.file.size > Number(form.dataset.most)) {
      ended(photo, "rejected", "The file is larger than the service takes.");
      return;
    }
    for (let attempt = 1; ; attempt += 1) {
      const body = new FormData();
      body.append("identity", photo.name);
      body.append("image", photo.file, photo.file.name);
      let response;
      try {
        response = await fetch("/enroll/photos", {
          method: "POST", body, headers: { "X-Form-Token": formToken(), "HX-Request": "true", Accept: "text/html" },
        });
      } catch {
        ended(photo, "rejected", "The service did not answer, or the file cannot be read any more.");
        return;
      }
      const target = response.headers.get("HX-Redirect");
      if (target) { location.assign(target); return; }
      if (isBusy(response) && attempt < ATTEMPTS && !state.stopped) {
        await wait();
        continue;
      }
      ended(photo, response.ok ? "enrolled" : "rejected", null, await response.text());
      return;
    }
  }

  // `html` is a part of a page that the service made, with all names escaped.
  function ended(photo, kind, text, html) {
    const item = document.createElement("li");
    const file = document.createElement("bdi");
    file.className = "file";
    file.textContent = photo.path;
    const said = document.createElement("span");
    if (html) said.innerHTML = html; else said.textContent = text;
    item.append(file, " ", said);
    state.done += 1;
    if (kind === "rejected") state.rejected.push(photo);
    const what = one(".what", said);
    const counted = what ? what.textContent.split(",")[0].trim() : "rejected";
    state.counts[counted] = (state.counts[counted] || 0) + 1;
    one(kind === "rejected" ? "[data-rejected]" : "[data-done] ul", section).append(item);
    show();
  }

  function show() {
    const busy = state.running > 0 || state.waiting.length > 0;
    const progress = one("progress", section);
    progress.max = state.total || 1;
    progress.value = state.done;
    const counts = Object.entries(state.counts).map(([what, number]) => `${number} ${what}`).join(", ");
    one("[data-counts]", section).textContent = `${state.done} of ${state.total} photos${counts ? `: ${counts}` : ""}`;
    one("[data-rejected-title]", section).hidden = !state.rejected.length;
    one("[data-done]", section).hidden = !one("[data-done] li", section);
    one("[data-retry]", section).hidden = busy || !state.rejected.length;
    one("[data-stop]", section).hidden = !busy;
  }

  one("[data-retry]", section).addEventListener("click", () => {
    const again = state.rejected;
    state.rejected = [];
    state.done -= again.length;
    state.counts.rejected = 0;
    delete state.counts.rejected;
    one("[data-rejected]", section).replaceChildren();
    state.waiting.push(...again);
    show();
    while (state.running < AT_A_TIME && state.waiting.length) work();
  });
  one("[data-stop]", section).addEventListener("click", () => {
    state.total -= state.waiting.length;
    state.waiting = [];
    state.stopped = true;
    show();
  });
  window.addEventListener("beforeunload", (event) => {
    if (state.running || state.waiting.length) event.preventDefault();
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  for (const input of all("[data-files]", form)) {
    input.addEventListener("change", () => {
      add([...input.files].map((file) => ({ file, path: file.webkitRelativePath || file.name })));
      input.value = "";
    });
  }
  document.addEventListener("paste", (event) => {
    if (event.clipboardData.files.length) add([...event.clipboardData.files].map((file) => ({ file, path: file.name })));
  });
  setUpDrop(form, async (transfer) => add(await droppedFiles(transfer)));
}

// Jobs: the events of a job until its end, then the whole of it.
function watch(card) {
  const events = new EventSource(card.dataset.events);
  const shown = (event) => {
    const job = JSON.parse(event.data);
    const state = one("[data-state]", card);
    state.textContent = job.state;
    state.className = `state ${job.state}`;
    const far = one("[data-far]", card);
    far.hidden = !job.total;
    far.max = job.total || 1;
    far.value = job.done;
    one("[data-counts]", card).textContent = Object.entries(job.counts).map(([status, number]) => `${number} ${status}`).join(", ");
  };
  events.addEventListener("progress", shown);
  events.addEventListener("end", (event) => {
    shown(event);
    events.close();
    htmx.ajax("GET", `/jobs/${encodeURIComponent(card.dataset.job)}`, { target: card, swap: "outerHTML" });
  });
}

// Doubts: a key for each answer; the next doubt gets the focus, and what was done is said.
const KEYS = "faceprint-keys";

function doubtShown(section, said) {
  said.textContent = one("[data-now]", section).dataset.now;
  one("#doubt-problem").replaceChildren();
  watchAudit(section);
  const next = one("[data-focus]", section);
  if (next) next.focus();
}

function setUpDoubts(section) {
  const choice = one("[data-keys]");
  const keys = one("input", choice);
  choice.hidden = !one("[data-key]", section);
  keys.checked = localStorage.getItem(KEYS) !== "off";
  const shown = () => section.classList.toggle("without-keys", !keys.checked);
  keys.addEventListener("change", () => {
    localStorage.setItem(KEYS, keys.checked ? "on" : "off");
    shown();
  });
  shown();
  document.addEventListener("keydown", (event) => {
    // A key that is held down would answer doubts that were not looked at.
    if (!keys.checked || event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
    const button = one(`[data-key="${CSS.escape(event.key.toLowerCase())}"]`, section);
    if (!button) return;
    event.preventDefault();
    button.click();
  });
  // A refusal does not take the place of the doubt.
  document.addEventListener("htmx:beforeSwap", (event) => {
    if (event.detail.target === section && event.detail.xhr.status >= 400) event.detail.target = one("#doubt-problem");
  });
  watchAudit(section);
}

// An audit that runs; where a doubt is shown meanwhile, its end does not replace that.
let audit = null;

function watchAudit(section) {
  if (audit) audit.close();
  const card = one("[data-audit]", section);
  if (!card) return;
  const far = one("[data-far]", card);
  audit = new EventSource(card.dataset.audit);
  audit.addEventListener("progress", (event) => {
    const job = JSON.parse(event.data);
    one("progress", card).max = job.total || 1;
    one("progress", card).value = job.done;
    far.textContent = `${Math.floor(100 * job.done / (job.total || 1))} %`;
    if (job.state === "running") one("h2", card).textContent = "The audit runs";
  });
  audit.addEventListener("end", () => {
    audit.close();
    if (!one("#doubt", section)) {
      htmx.ajax("GET", "/doubts", { target: section, swap: "innerHTML" });
      return;
    }
    const link = document.createElement("a");
    link.className = "button";
    link.href = "/doubts";
    link.textContent = "Show what it found";
    one("h2", card).textContent = "The audit has ended";
    one("progress", card).remove();
    one(".choices", card).replaceChildren(link);
    one("[data-said]").textContent = "The audit has ended.";
  });
}

// Photos of a person: how many are chosen.
function setUpChoice(form) {
  const chosen = one("[data-chosen]", form);
  if (!chosen) return;
  const count = () => {
    const number = all('input[name="face"]:checked', form).length;
    chosen.textContent = number === 0 ? "No photo" : number === 1 ? "1 photo" : `${number} photos`;
    form.classList.toggle("choosing", number > 0);
    for (const button of all(".assign button", form)) button.disabled = number === 0;
  };
  form.addEventListener("change", count);
  count();
}

document.addEventListener("DOMContentLoaded", () => {
  const search = one("#ask");
  if (search) {
    setUpSearch(search);
    setUpDrop(search, (transfer) => { if (transfer.files.length) ask(search, transfer.files[0]); });
  }
  const enroll = one("#enroll");
  if (enroll) setUpEnroll(enroll);
  const doubts = one("#doubts");
  if (doubts) setUpDoubts(doubts);
  all("[data-events]").forEach(watch);
  all(".photos-form").forEach(setUpChoice);
});
