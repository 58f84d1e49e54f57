// The server's API: requests, and streams of server-sent events.

let key = sessionStorage.getItem("key") || "";

export function setKey(value) {
  key = value;
  sessionStorage.setItem("key", value);
}

export class ServerError extends Error {
  constructor(status, error) {
    super(error.message);
    this.status = status;
    this.param = error.param;
  }
}

async function send(path, options = {}) {
  const headers = { ...(options.headers || {}), ...(key ? { authorization: `Bearer ${key}` } : {}) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(0, { message: "The server does not answer. Is it still running?" });
  }
  if (response.ok) return response;
  let body = null;
  try {
    body = await response.json();
  } catch { /* it is no JSON */ }
  throw new ServerError(response.status, (body && body.error) || { message: `The server answered ${response.status}.` });
}

export async function models() {
  return (await (await send("/v1/models")).json()).data;
}

export async function model(id) {
  return (await send(`/v1/models/${encodeURIComponent(id)}`)).json();
}

// The recipe inside an image file; null if it has none.
export async function recipeOf(blob) {
  const body = JSON.stringify({ image: await asBase64(blob) });
  const response = await send("/sdapi/v1/png-info", {
    method: "POST", headers: { "content-type": "application/json" }, body,
  });
  const recipe = (await response.json()).parameters;
  return recipe && recipe.task ? recipe : null;
}

// Draw images; `onEvent` is called with every event of the stream.
export async function draw(endpoint, fields, files, signal, onEvent) {
  const wanted = { ...fields, stream: true, progress: true, preview_every: 1 };
  let options;
  if (endpoint === "generations") {
    options = { headers: { "content-type": "application/json" }, body: JSON.stringify(wanted) };
  } else {
    const form = new FormData();
    for (const [name, value] of Object.entries(wanted)) form.append(name, String(value));
    for (const [name, blob] of Object.entries(files)) form.append(name, blob, `${name}.png`);
    options = { body: form };
  }
  const response = await send(`/v1/images/${endpoint}`, { ...options, method: "POST", signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    rest += value;
    const events = rest.split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("\n");
      if (!data || data === "[DONE]") continue;
      const content = JSON.parse(data);
      if (content.type === "error") throw new ServerError(500, content.error);
      onEvent(content);
    }
  }
}

export function asBase64(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(new Error("The file cannot be read."));
    reader.readAsDataURL(blob);
  });
}

export function asBlob(base64, type) {
  return new Blob([Uint8Array.from(atob(base64), (char) => char.charCodeAt(0))], { type });
}
