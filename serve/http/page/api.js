// Requests to the server this page came from: the key, streams, and what went wrong, in words.

/** What a person is told. `isAboutKey`: typing another key may help. */
export class Trouble extends Error {
  constructor(message, isAboutKey = false) {
    super(message);
    this.isAboutKey = isAboutKey;
  }
}

const KEY = "idlm-key";

export const storedKey = () => sessionStorage.getItem(KEY) ?? "";
export const storeKey = (key) => sessionStorage.setItem(KEY, key);

const headers = () => (storedKey() ? { authorization: `Bearer ${storedKey()}` } : {});

/** The JSON at a path. Throws Trouble. */
export async function get(path) {
  const response = await ask(path, { headers: headers(), signal: AbortSignal.timeout(10_000) });
  return response.json().catch(() => {
    throw new Trouble("The server's answer is not JSON.");
  });
}

/** Yields the JSON events of a streamed answer. Throws Trouble, or AbortError once `signal` is aborted. */
export async function* stream(path, body, signal) {
  const response = await ask(path, {
    method: "POST",
    headers: { "content-type": "application/json", ...headers() },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  try {
    for (;;) {
      const { value, done } = await reader.read().catch((error) => {
        if (signal.aborted) throw error;
        throw new Trouble("The connection was lost in the middle of the answer.");
      });
      if (done) throw new Trouble("The connection ended before the answer was complete.");
      const parts = (held + value).split(/\r?\n\r?\n/);
      held = parts.pop();
      for (const part of parts) {
        const data = dataOf(part);
        if (data === "[DONE]") return;
        if (data === "") continue;
        const event = parsed(data);
        if (event.error) throw new Trouble(`The server failed in the middle of the answer: ${event.error.message}`);
        yield event;
      }
    }
  } finally {
    // Whoever stops reading also hangs up.
    reader.cancel().catch(() => {});
  }
}

function dataOf(event) {
  const lines = event.split(/\r?\n/).filter((line) => line.startsWith("data:"));
  return lines.map((line) => line.slice(5).replace(/^ /, "")).join("\n");
}

function parsed(data) {
  try {
    return JSON.parse(data);
  } catch {
    throw new Trouble("The server sent an event that is not JSON.");
  }
}

async function ask(path, how) {
  let response;
  try {
    response = await fetch(path, how);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Trouble("The server cannot be reached. Is it still running, and are you online?");
  }
  if (!response.ok) throw await troubleOf(response);
  return response;
}

async function troubleOf(response) {
  const said = await response.json().then((body) => String(body.error.message), () => "");
  const detail = said && ` (${said})`;
  switch (response.status) {
    case 401:
      return new Trouble(
        storedKey() ? "The server does not accept this API key." : "The server asks for an API key: type it under Settings.",
        true,
      );
    case 413:
      return new Trouble(`This is more than the server takes in one request${detail}.`);
    case 429:
      return new Trouble(`The queue is full: try again in ${seconds(response)}${detail}.`);
    case 503:
      return new Trouble(`The server is not able to answer now: try again in ${seconds(response)}${detail}.`);
    default:
      return new Trouble(`The server refused (${response.status}): ${said || "it did not say why"}`);
  }
}

function seconds(response) {
  const wait = Number(response.headers.get("retry-after"));
  return wait > 1 ? `${wait} seconds` : "a second";
}
