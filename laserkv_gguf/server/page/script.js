"use strict";

const $ = (id) => document.getElementById(id);
const number = (value) => Math.round(value).toLocaleString("en");
const seconds = (value) => (value < 10 ? value.toFixed(1) : number(value)) + " s";

let talk = [];        // messages as they are sent
let documents = [];   // {id, name} of files that the next question brings along
let stopping = null;  // of the answer under way

function headers(more) {
  const key = sessionStorage.getItem("key");
  return key ? { ...more, Authorization: "Bearer " + key } : { ...more };
}

async function call(path, options = {}) {
  const again = () => fetch(path, { ...options, headers: headers(options.headers) });
  let reply = await again();
  if (reply.status === 401) {
    await askForKey();
    reply = await again();
  }
  if (!reply.ok) {
    let message = "The server answered " + reply.status + ".";
    try { message = (await reply.json()).error.message; } catch (_) { /* it is no JSON */ }
    throw new Error(message);
  }
  return reply;
}

function askForKey() {
  return new Promise((done) => {
    $("key").showModal();
    $("key").addEventListener("close", () => {
      sessionStorage.setItem("key", $("secret").value);
      done();
    }, { once: true });
  });
}

function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function line(className, text) {
  const item = element("li", className);
  const said = element("p", "said", text);
  item.append(said);
  $("talk").append(item);
  $("hint").hidden = true;
  item.scrollIntoView({ block: "end" });
  return said;
}

// documents

function showDocuments() {
  $("documents").replaceChildren(...documents.map((one) => {
    const item = element("li");
    const drop = element("button", "", "×");
    drop.type = "button";
    drop.setAttribute("aria-label", "Leave out " + one.name);
    drop.addEventListener("click", () => {
      documents = documents.filter((other) => other !== one);
      showDocuments();
      $("question").focus();
    });
    item.append(element("span", "", one.name), drop);
    return item;
  }));
}

async function add(files) {
  for (const file of files) {
    const form = new FormData();
    form.append("purpose", "user_data");
    form.append("file", file, file.name);
    try {
      const about = await (await call("v1/files", { method: "POST", body: form })).json();
      documents.push({ id: about.id, name: about.filename });
    } catch (error) {
      line("failed", file.name + ": " + error.message);
    }
    showDocuments();
  }
  $("question").focus();
}

$("files").addEventListener("change", () => {
  add([...$("files").files]);
  $("files").value = "";
});
let depth = 0;
addEventListener("dragenter", (event) => { event.preventDefault(); depth++; document.body.classList.add("over"); });
addEventListener("dragleave", () => { if (--depth <= 0) document.body.classList.remove("over"); });
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", (event) => {
  event.preventDefault();
  depth = 0;
  document.body.classList.remove("over");
  add([...event.dataTransfer.files]);
});

// questions

function reading(read, total) {
  $("reading").hidden = total === undefined;
  if (total !== undefined) {
    $("bar").value = total ? read / total : 0;
    $("read").textContent = "reading " + number(read) + " of " + number(total) + " tokens";
  }
}

async function* lines(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    for (let at; (at = held.indexOf("\n")) >= 0; held = held.slice(at + 1)) yield held.slice(0, at);
  }
}

async function ask(question) {
  const text = { type: "text", text: question };
  const files = documents.map((one) => ({ type: "file", file: { file_id: one.id } }));
  const message = { role: "user", content: [...files, text] };
  const names = documents.map((one) => one.name).join(", ");
  line("mine", question + (names ? "\n[" + names + "]" : ""));
  const said = line("", "");
  const given = documents;
  documents = [];
  showDocuments();
  busy(true);
  stopping = new AbortController();
  let answer = "", about = null;
  try {
    const reply = await call("v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ messages: [...talk, message], stream: true }),
      signal: stopping.signal,
    });
    for await (const one of lines(reply)) {
      const found = /^: read (\d+) of (\d+)/.exec(one);
      if (found) reading(Number(found[1]), Number(found[2]));
      if (!one.startsWith("data: ") || one === "data: [DONE]") continue;
      const chunk = JSON.parse(one.slice(6));
      if (chunk.error) throw new Error(chunk.error.message);
      if (chunk.laserkv) about = chunk.laserkv;
      const piece = chunk.choices?.[0]?.delta?.content;
      if (piece) {
        reading();
        answer += piece;
        said.textContent = answer;
        said.scrollIntoView({ block: "end" });
      }
    }
    talk.push(message, { role: "assistant", content: answer });
  } catch (error) {
    documents = given;  // what was not answered can be asked again
    showDocuments();
    said.parentNode.classList.add("failed");
    said.textContent = answer + (error.name === "AbortError" ? " [stopped]" : error.message);
    $("question").value = $("question").value || question;
  }
  reading();
  busy(false);
  if (about) account(said.parentNode, about);
}

function account(item, about) {
  const said = element("div", "account quiet");
  const parts = [];
  if (about.found === "new" && about.document_tokens > 0) parts.push("read " + number(about.document_tokens) + " tokens");
  else if (about.cached_tokens) parts.push(number(about.cached_tokens) + " tokens were read before (" + about.found + ")");
  if (about.kept_fraction < 1) parts.push("saw " + number(about.kept_tokens) + " of " + number(about.document_tokens));
  if (about.recalled_tokens) parts.push("looked up " + number(about.recalled_tokens));
  if (about.times_turns_were_thinned) parts.push("older turns are thinned");
  parts.push("first word after " + seconds(about.first_seconds));
  parts.push(number(about.generated_tokens) + " tokens, " + about.decode_tokens_per_second.toFixed(1) + " a second");
  said.append(...parts.map((part) => element("span", "", part)));
  if (about.kept_fraction < 1) {
    const show = element("button", "", "Show the document");
    show.type = "button";
    show.addEventListener("click", () => kept(about.document));
    said.append(show);
    if (!$("kept").hidden || matchMedia("(min-width: 60rem)").matches) kept(about.document);
  }
  item.append(said);
  said.scrollIntoView({ block: "end" });
}

async function kept(id) {
  try {
    const made = await (await call("v1/documents/" + id + "/report", { method: "POST" })).json();
    $("report").src = made.url;
    $("apart").href = made.url;
    $("kept").hidden = false;
  } catch (error) {
    line("failed", error.message);
  }
}

function busy(is) {
  $("send").disabled = is;
  $("stop").hidden = !is;
  if (!is) $("question").focus();
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = $("question").value.trim();
  if (!question || $("send").disabled) return;
  $("question").value = "";
  ask(question);
});
$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("ask").requestSubmit();
  }
});
$("stop").addEventListener("click", () => stopping && stopping.abort());
$("hide").addEventListener("click", () => { $("kept").hidden = true; $("question").focus(); });
$("new").addEventListener("click", () => {
  if (stopping) stopping.abort();
  talk = [];
  documents = [];
  showDocuments();
  $("talk").replaceChildren();
  $("hint").hidden = false;
  $("kept").hidden = true;
  $("question").focus();
});
addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if (stopping && $("send").disabled) stopping.abort();
  else $("kept").hidden = true;
});

call("v1/models").then((reply) => reply.json()).then((found) => {
  $("model").textContent = found.data[0].id;
}).catch((error) => { $("model").textContent = error.message; });
$("question").focus();
