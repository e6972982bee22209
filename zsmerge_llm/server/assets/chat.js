// The chat page. All text goes to the page as text, never as HTML. Conversations are kept in this browser; the server
// keeps their caches, and finds them by the id that this page gives them.

const $ = (id) => document.getElementById(id);
const STORE = "zsmerge.conversations";
const state = { conversations: load(), current: null, model: "", abort: null };

function load() {
  try {
    const found = JSON.parse(localStorage.getItem(STORE));
    return Array.isArray(found) ? found.filter(isConversation) : [];
  } catch {
    return [];
  }
}

function isConversation(each) {
  return each && typeof each.id === "string" && typeof each.title === "string" && Array.isArray(each.messages)
    && each.messages.every((message) => typeof message.role === "string" && typeof message.content === "string");
}

function keep() {
  try {
    localStorage.setItem(STORE, JSON.stringify(state.conversations));
  } catch {
    say("This browser has no room to keep the conversations: save the ones you need.");
  }
}

const newId = () => `web-${[...crypto.getRandomValues(new Uint8Array(8))].map((n) => n.toString(16).padStart(2, "0")).join("")}`;
const number = (value) => Math.round(value).toLocaleString("en");
const megabytes = (bytes) => `${(bytes / 1e6).toLocaleString("en", { maximumFractionDigits: bytes < 1e7 ? 1 : 0 })} MB`;
const say = (text) => { $("status").textContent = text; };

// -- the server ------------------------------------------------------------------------------------------------------

async function request(path, options = {}) {
  for (;;) {
    const key = sessionStorage.getItem("zsmerge.key");
    const headers = { ...options.headers, ...(key ? { authorization: `Bearer ${key}` } : {}) };
    const response = await fetch(path, { ...options, headers });
    if (response.status !== 401) {
      if (!response.ok) {
        const body = await response.json().catch(() => ({}));
        throw new Error(body.error?.message ?? `The server answered ${response.status}.`);
      }
      return response;
    }
    await askForKey();
  }
}

function askForKey() {
  $("access").showModal();
  return new Promise((resolve) => {
    $("access").addEventListener("close", () => {
      sessionStorage.setItem("zsmerge.key", $("key").value.trim());
      $("key").value = "";
      resolve();
    }, { once: true });
  });
}

const post = (path, body, signal) => request(path, {
  method: "POST", body: JSON.stringify(body), headers: { "content-type": "application/json" }, signal,
});

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("\n");
      if (data && data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

// -- a turn ----------------------------------------------------------------------------------------------------------

async function send(text) {
  const conversation = state.current;
  conversation.messages.push({ role: "user", content: text });
  if (conversation.messages.length === 1) conversation.title = text.slice(0, 60);
  const answer = { role: "assistant", content: "" };
  keep();
  render();
  const item = addMessage(answer);
  state.abort = new AbortController();
  busy(true);
  say("Reading …");
  try {
    const first = conversation.document && conversation.messages.length === 1;
    const body = {
      model: state.model, messages: conversation.messages, stream: true,
      stream_options: { include_usage: true }, max_tokens: 1024,
      ...(conversation.document ? { document_id: conversation.document.id } : { session_id: conversation.id }),
    };
    for await (const event of events(await post("/v1/chat/completions", body, state.abort.signal))) {
      if (event.error) throw new Error(event.error.message);
      const delta = event.choices[0]?.delta ?? {};
      if (delta.reasoning_content) addReasoning(item, delta.reasoning_content);
      if (delta.content) {
        answer.content += delta.content;
        item.lastChild.textContent = answer.content;
        say("");
        scroll();
      }
      if (event.session_id && (first || conversation.document)) conversation.session = event.session_id;
      if (event.usage) showUsage(event.usage);
    }
  } catch (error) {
    if (error.name === "AbortError") say("Stopped.");
    else fail(item, error.message);
  }
  state.abort = null;
  busy(false);
  if (answer.content) conversation.messages.push(answer);
  else conversation.messages.pop();
  keep();
  await showMemory(conversation);
}

function fail(item, text) {
  item.classList.add("error");
  item.lastChild.textContent = text;
  say("The message was not answered.");
}

function busy(is) {
  $("send").hidden = is;
  $("stop").hidden = !is;
  $("new").disabled = is;
  $("list").inert = is;
  if (!is) $("text").focus();
}

function showUsage(usage) {
  const rate = usage.zsmerge.decode_seconds ? usage.completion_tokens / usage.zsmerge.decode_seconds : 0;
  const read = usage.prompt_tokens - usage.prompt_tokens_details.cached_tokens;
  say(`${number(read)} tokens read now, ${number(usage.prompt_tokens_details.cached_tokens)} before · ${rate.toFixed(1)} tokens/s`);
}

const serverId = (conversation) => conversation.session ?? conversation.document?.id ?? conversation.id;

async function showMemory(conversation) {
  $("memory").textContent = "";
  if (!conversation.messages.length && !conversation.document) return;
  try {
    const id = serverId(conversation);
    const { cache } = await (await request(`/v1/sessions/${encodeURIComponent(id)}`)).json();
    if (conversation !== state.current) return;
    $("memory").textContent = `${number(cache.read_tokens)} tokens read · ${number(cache.verbatim_tokens)} held · `
      + `${number(cache.dropped_tokens)} dropped · cache ${megabytes(cache.bytes)} (a full cache: ${megabytes(cache.full_cache_bytes)}) `;
    $("memory").append(button("Memory map", () => showMap(id)));
  } catch {
    $("memory").textContent = "The server no longer keeps this conversation; it reads it again with the next message.";
  }
}

async function showMap(id) {
  const path = `/v1/sessions/${encodeURIComponent(id)}/map`;
  if (!sessionStorage.getItem("zsmerge.key")) {
    open(path, "_blank", "noopener");
    return;
  }
  download(await (await request(path)).blob(), "memory-map.html");  // a link could not carry the key
}

// -- documents -------------------------------------------------------------------------------------------------------

async function readDocument(file) {
  if (state.abort) return;
  const form = new FormData();
  form.append("file", file);
  say(`Reading ${file.name} …`);
  state.abort = new AbortController();
  busy(true);
  try {
    const response = await request("/v1/documents/file", { method: "POST", body: form, signal: state.abort.signal });
    const read = await response.json();
    begin({ id: newId(), title: file.name, messages: [], document: { id: read.id, name: file.name } });
    say(`${file.name}: ${number(read.tokens)} tokens read. Ask about it.`);
  } catch (error) {
    say(error.name === "AbortError" ? "Stopped." : error.message);
  }
  state.abort = null;
  busy(false);
  await showMemory(state.current);
}

// -- conversations ---------------------------------------------------------------------------------------------------

function begin(conversation = { id: newId(), title: "New conversation", messages: [] }) {
  state.conversations = state.conversations.filter((each) => each.messages.length || each.document);
  state.conversations.unshift(conversation);
  choose(conversation);
}

function choose(conversation) {
  state.current = conversation;
  $("side").classList.remove("open");
  $("toggle").setAttribute("aria-expanded", "false");
  say("");
  keep();
  render();
  showMemory(conversation);
  $("text").focus();
}

async function fork(conversation) {
  const copy = { ...structuredClone(conversation), id: newId(), title: `${conversation.title} (copy)` };
  if (conversation.messages.length) {
    try {
      await post(`/v1/sessions/${encodeURIComponent(serverId(conversation))}/fork`, { id: copy.id });
      if (copy.document) copy.session = copy.id;
    } catch (error) {
      say(error.message);
    }
  }
  begin(copy);
}

function rename(conversation, item) {
  const field = document.createElement("input");
  field.value = conversation.title;
  field.setAttribute("aria-label", "Title");
  item.replaceChildren(field);
  field.select();
  const done = (changed) => {
    if (changed && field.value.trim()) conversation.title = field.value.trim();
    keep();
    render();
  };
  field.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === "Escape") done(event.key === "Enter");
    event.stopPropagation();
  });
}

function save(conversation) {
  const name = conversation.title.replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 40) || "conversation";
  download(new Blob([JSON.stringify(conversation, null, 1)], { type: "application/json" }), `${name}.json`);
}

function download(blob, name) {
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: name });
  link.click();
  URL.revokeObjectURL(link.href);
}

async function remove(conversation) {
  if (!confirm(`Delete “${conversation.title}” here and on the server?`)) return;
  const id = conversation.messages.length ? conversation.session ?? conversation.id : null;
  if (id) await request(`/v1/sessions/${encodeURIComponent(id)}`, { method: "DELETE" }).catch(() => {});
  state.conversations = state.conversations.filter((each) => each !== conversation);
  state.conversations.length ? choose(state.conversations[0]) : begin();
}

async function openFile(file) {
  try {
    const read = JSON.parse(await file.text());
    if (!isConversation(read)) throw new Error();
    begin({ ...read, id: newId() });
  } catch {
    say(`${file.name} is no saved conversation.`);
  }
}

// -- drawing ---------------------------------------------------------------------------------------------------------

function button(text, action) {
  const made = Object.assign(document.createElement("button"), { type: "button", textContent: text });
  made.addEventListener("click", action);
  return made;
}

function render() {
  $("list").replaceChildren(...state.conversations.map((conversation) => {
    const item = document.createElement("li");
    item.classList.toggle("current", conversation === state.current);
    const title = button(conversation.title, () => choose(conversation));
    title.className = "title";
    const actions = document.createElement("div");
    actions.className = "actions";
    actions.append(
      button("Fork", () => fork(conversation)), button("Rename", () => rename(conversation, item)),
      button("Save", () => save(conversation)), button("Delete", () => remove(conversation)),
    );
    item.append(title, actions);
    return item;
  }));
  $("messages").replaceChildren();
  state.current.messages.forEach(addMessage);
  $("empty").hidden = state.current.messages.length > 0;
  $("empty").style.display = state.current.messages.length > 0 ? "none" : "";
  $("document").hidden = !state.current.document;
  $("document").textContent = state.current.document ? `About ${state.current.document.name}` : "";
  scroll();
}

function addMessage(message) {
  const item = document.createElement("li");
  item.className = message.role;
  const text = document.createElement("span");
  text.textContent = message.content;
  item.append(text);
  $("messages").append(item);
  $("empty").style.display = "none";
  scroll();
  return item;
}

function addReasoning(item, text) {
  if (item.childElementCount === 1) {
    const reasoning = document.createElement("span");
    reasoning.className = "reasoning";
    item.prepend(reasoning);
  }
  item.firstChild.textContent += text;
}

function scroll() {
  $("messages").scrollTop = $("messages").scrollHeight;
}

// -- beginning -------------------------------------------------------------------------------------------------------

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("text").value.trim();
  if (!text || state.abort) return;
  $("text").value = "";
  send(text);
});
$("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("form").requestSubmit();
  }
});
$("stop").addEventListener("click", () => state.abort?.abort());
$("new").addEventListener("click", () => begin());
$("toggle").addEventListener("click", () => {
  $("toggle").setAttribute("aria-expanded", String($("side").classList.toggle("open")));
});
$("file").addEventListener("change", (event) => {
  if (event.target.files[0]) readDocument(event.target.files[0]);
  event.target.value = "";
});
$("open").addEventListener("change", (event) => {
  if (event.target.files[0]) openFile(event.target.files[0]);
  event.target.value = "";
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") state.abort?.abort();
  if (event.altKey && event.key.toLowerCase() === "n" && !state.abort) begin();
});
for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    document.body.classList.toggle("dropping", kind === "dragover");
    if (kind === "drop" && event.dataTransfer.files[0]) readDocument(event.dataTransfer.files[0]);
  });
}

try {
  const models = await (await request("/v1/models")).json();
  state.model = models.data[0].id;
  $("model").textContent = state.model;
} catch (error) {
  say(error.message);
}
state.conversations.length ? choose(state.conversations[0]) : begin();
