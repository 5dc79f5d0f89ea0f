// What is said and how it is shown. Text of the model or of a person enters the page as textContent only.

import { Trouble, stream } from "/page/api.js";

/** An element with a class and, possibly, text. */
export function element(name, className = "", text = "") {
  const made = document.createElement(name);
  made.className = className;
  made.textContent = text;
  return made;
}

/** One answer on its way to the page: chunks in colour, thoughts folded, and a line that sums it up. */
class Answer {
  constructor(log, who, className) {
    this.turn = element("article", `turn ${className}`);
    this.text = element("div", "text");
    this.turn.append(element("h2", "", who), this.text);
    // A screen reader hears the answer when it is whole, not chunk by chunk.
    this.turn.setAttribute("aria-busy", "true");
    this.log = log;
    this.content = "";
    this.numTokens = null;
    this.perForward = null;
    this.usage = null;
    this.reason = null;
    this.start = performance.now();
    log.append(this.turn);
    this.follow(true);
  }

  continueText(given) {
    this.text.append(element("span", "given", given));
    this.follow(true);
  }

  take(event) {
    this.usage = event.usage ?? this.usage;
    const choice = event.choices?.[0];
    if (choice === undefined) return;
    const count = event.idlm?.num_tokens;
    if (count !== undefined) this.numTokens = (this.numTokens ?? 0) + count;
    // One forward may be told in two chunks, thoughts and answer; the first has the number.
    this.perForward = count ?? this.perForward;
    this.reason = choice.finish_reason ?? this.reason;
    const thought = choice.delta?.reasoning_content ?? "";
    const said = choice.delta?.content ?? choice.text ?? "";
    if (thought) this.show(thought, this.thoughts());
    if (said) this.show(said, this.text);
    this.content += said;
  }

  show(text, where) {
    const isAtEnd = this.isAtEnd();
    const count = this.perForward;
    const chunk = element("span", `chunk k${Math.min(count ?? 0, 5)}`, text);
    chunk.title = count === null ? "tokens per forward unknown" : `tokens that came together: ${count}`;
    where.append(chunk);
    this.follow(isAtEnd);
  }

  thoughts() {
    if (this.thinking === undefined) {
      const details = element("details", "thoughts");
      this.thinking = element("div", "text");
      details.append(element("summary", "", "Reasoning"), this.thinking);
      this.text.before(details);
    }
    return this.thinking;
  }

  end(note) {
    const isAtEnd = this.isAtEnd();
    const taken = (performance.now() - this.start) / 1000;
    const words = [note, ...summary(this.usage, this.numTokens, taken), this.reason && `ended by ${this.reason}`];
    this.turn.append(element("p", "summary", words.filter(Boolean).join(" · ")));
    this.turn.removeAttribute("aria-busy");
    this.follow(isAtEnd);
  }

  // Who has scrolled up to read is left there.
  isAtEnd() {
    return this.log.scrollHeight - this.log.scrollTop - this.log.clientHeight < 40;
  }

  follow(isAtEnd) {
    if (isAtEnd) this.log.scrollTop = this.log.scrollHeight;
  }
}

function summary(usage, numSeen, taken) {
  const count = usage?.completion_tokens ?? numSeen;
  const words = [];
  if (count !== null) words.push(`${count} tokens`);
  const idlm = usage?.idlm;
  if (idlm) {
    words.push(`${idlm.tokens_per_forward.toFixed(2)} per forward`);
    const shares = idlm.verified_by_depth.map((verified, depth) => percent(idlm.accepted_by_depth[depth], verified));
    if (shares.length) words.push(`drafts accepted by depth ${shares.join(", ")}`);
  }
  words.push(`${taken.toFixed(2)} s`);
  if (count !== null && taken > 0) words.push(`${(count / taken).toFixed(1)} tokens/s`);
  return words;
}

/** A share in words; a dash where there is nothing to share. */
export const percent = (part, whole) => (whole ? `${Math.round((100 * part) / whole)} %` : "–");

/** The turns of a chat, or single texts that the model continues. */
export class Conversation {
  constructor(log) {
    this.log = log;
    this.turns = [];
    this.running = null;
  }

  get isBusy() {
    return this.running !== null;
  }

  stop() {
    this.running?.abort();
  }

  clear() {
    this.stop();
    this.turns = [];
    this.log.replaceChildren();
  }

  /** Says `text`, and shows what comes back. Throws Trouble; what was said before any answer is then taken back. */
  async say(text, mode, system, params) {
    const controller = new AbortController();
    this.running = controller;
    const isChat = mode === "chat";
    const turn = { role: "user", content: text };
    const said = isChat && element("article", "turn user");
    if (isChat) {
      said.append(element("h2", "", "You"), element("div", "text", text));
      this.log.append(said);
    }
    const answer = new Answer(this.log, isChat ? "Model" : "Completion", mode);
    if (!isChat) answer.continueText(text);
    const opening = system ? [{ role: "system", content: system }] : [];
    const body = isChat ? { messages: [...opening, ...this.turns, turn] } : { prompt: text };
    const path = isChat ? "/v1/chat/completions" : "/v1/completions";
    let note = "";
    try {
      for await (const event of stream(path, { ...body, ...params }, controller.signal)) answer.take(event);
    } catch (error) {
      if (!controller.signal.aborted) {
        if (answer.content || answer.thinking) note = "incomplete";
        else {
          answer.turn.remove();
          if (said) said.remove();
          throw new Refused(error);
        }
        throw error;
      }
      note = "stopped";
    } finally {
      this.running = null;
      if (answer.turn.isConnected) {
        answer.end(note);
        // What was cleared away in the meantime is not remembered either.
        if (isChat) this.turns.push(turn, { role: "assistant", content: answer.content });
      }
    }
  }
}

/** Nothing was answered: the text may be sent again. */
export class Refused extends Trouble {
  constructor(cause) {
    super(cause.message, cause.isAboutKey ?? false);
  }
}
