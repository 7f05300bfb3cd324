"use strict";
// Drives the page: the browser of pairs and the theme. Texts of records become text nodes only.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const at = (id) => document.getElementById(id);
  const NAMES = ["good", "bad", "original"];
  const SIGNS = { good: "y+", bad: "y-", original: "yo" };
  const PROMPTS = { query: "x", good: "x+", bad: "x-" };
  const several = data.runs.length > 1;

  function make(tag, attributes = {}, ...children) {
    const node = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) {
      if (key === "class") node.className = value;
      else if (key in node && typeof value !== "string") node[key] = value;
      else node.setAttribute(key, value);
    }
    node.append(...children);
    return node;
  }

  // What no eye sees (zero width, direction marks, control characters) is shown as its code.
  const HIDDEN =
    /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff9-\ufffb]|\udb40[\udc00-\udfff]/g;

  function shown(text) {
    const parts = document.createDocumentFragment();
    let from = 0;
    for (const match of text.matchAll(HIDDEN)) {
      parts.append(text.slice(from, match.index));
      const code = match[0].codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
      parts.append(make("span", { class: "ctl" }, `U+${code}`));
      from = match.index + match[0].length;
    }
    parts.append(text.slice(from));
    return parts;
  }

  const format = (value, digits = 3) =>
    value === undefined || value === null
      ? "not known"
      : Number.isInteger(value)
        ? value.toLocaleString("en")
        : value.toFixed(digits);
  const plural = (count, word) => `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;

  // ---------------------------------------------------------------------------------- theme

  const THEMES = ["system", "light", "dark"];
  let theme = "system";
  try {
    theme = localStorage.getItem("sso-report-theme") || "system";
  } catch { /* storage is closed to pages from disk in some browsers */ }

  function setTheme(next) {
    theme = THEMES.includes(next) ? next : "system";
    if (theme === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    at("theme").textContent = `Theme: ${theme}`;
    try {
      localStorage.setItem("sso-report-theme", theme);
    } catch { /* as above */ }
  }

  const label = (run, name) => (several ? `${run.name}: ${name}` : name);

  // ------------------------------------------------------------------------- browser of pairs

  const PAGE = 50;
  let matching = [];
  let visible = PAGE;
  let largest = false;

  const haystacks = new Map();
  function haystack(record) {
    if (!haystacks.has(record)) {
      const texts = [record.id, ...record.q.map(([, text]) => text), ...record.a, ...record.p.map((i) => data.strings[i])];
      haystacks.set(record, texts.join("\n").toLowerCase());
    }
    return haystacks.get(record);
  }

  function option(select, value, text) {
    select.append(make("option", { value }, text));
  }

  function total(keep) {
    let sum = 0;
    data.runs.forEach((run, r) => run.sets.forEach((set) => {
      for (const [features, flags, count] of set.cells) if (keep(r, set.name, features, flags)) sum += count;
    }));
    return sum;
  }

  function fillFilters() {
    option(at("f-run"), "", `all (${total(() => true).toLocaleString("en")})`);
    data.runs.forEach((run, r) => option(at("f-run"), String(r), `${run.name} (${total((q) => q === r).toLocaleString("en")})`));
    document.querySelector(".several-runs").hidden = !several;
    const sets = [...new Set(data.runs.flatMap((run) => run.sets.map((set) => set.name)))];
    option(at("f-set"), "", `all (${total(() => true).toLocaleString("en")})`);
    for (const name of sets) option(at("f-set"), name, `${name} (${total((r, set) => set === name).toLocaleString("en")})`);
    const features = [...new Set(data.runs.flatMap((run) => run.sets.flatMap((set) => set.cells.flatMap(([names]) => names))))].sort();
    option(at("f-feature"), "", "any");
    for (const name of features) option(at("f-feature"), name, `${name} (${total((r, s, names) => names.includes(name)).toLocaleString("en")})`);
    option(at("f-flag"), "", "any");
    option(at("f-flag"), "none", `no flag (${total((r, s, f, flags) => !flags.length).toLocaleString("en")})`);
    for (const [name, title] of Object.entries(data.flags)) option(at("f-flag"), name, `${title} (${total((r, s, f, flags) => flags.includes(name)).toLocaleString("en")})`);
    option(at("sort"), "", "as drawn");
    option(at("sort"), "id", "id");
    const keys = new Set(data.records.flatMap((record) => Object.keys(record.n)));
    for (const key of ["gap_logp", "truth_gap", "weight", "logp_good", "logp_bad", "contrast_good", "contrast_bad", "length_good", "length_bad", "length_original", "characters_good", "characters_bad"]) {
      if (keys.has(key)) option(at("sort"), key, key === "truth_gap" ? "exact quality, y+ minus y-" : (data.numbers[key] || key.replace("_good", " of y+").replace("_bad", " of y-")).replace(", mean", ""));
    }
  }

  function filter() {
    const words = at("search").value.toLowerCase().trim();
    const [run, set, feature, flag] = ["f-run", "f-set", "f-feature", "f-flag"].map((id) => at(id).value);
    const keep = (r, name, features, flags) =>
      (!run || r === Number(run)) && (!set || name === set) && (!feature || features.includes(feature)) &&
      (!flag || (flag === "none" ? !flags.length : flags.includes(flag)));
    matching = data.records.filter((record) =>
      keep(record.r, data.runs[record.r].sets[record.s].name, record.f, record.g) && (!words || haystack(record).includes(words)));
    const key = at("sort").value;
    const sign = largest ? -1 : 1;
    at("direction").disabled = !key;
    if (key === "id") matching.sort((a, b) => sign * (a.id < b.id ? -1 : a.id > b.id ? 1 : 0));
    else if (key) {
      const value = (record) => (record.n[key] === undefined ? sign * Infinity : record.n[key]);
      matching.sort((a, b) => sign * (value(a) - value(b)) || 0);
    }
    const all = total(keep);
    at("count").textContent =
      `${plural(matching.length, "record")} of this page${words ? " with these words" : ""}. ` +
      `${plural(all, "record")} of all ${total(() => true).toLocaleString("en")} pass the filters${words ? "; the search looks through this page only" : ""}.`;
    visible = PAGE;
    list();
  }

  function preview(record, name, index) {
    if (record.fold.includes(name)) {
      const size = (record.cut[name] || record.a[index].length).toLocaleString("en");
      return `(folded: ${size} characters)`;
    }
    return shown(record.a[index].slice(0, 240));
  }

  function row(record) {
    const set = data.runs[record.r].sets[record.s];
    const asked = record.fold.includes("query") ? "(folded)" : shown(record.q[record.q.length - 1][1].slice(0, 240));
    const meta = make("span", { class: "meta" }, make("bdi", {}, shown(record.id)), ` · ${label(data.runs[record.r], set.name)}`, record.f.length ? " · " : "", shown(record.f.join(", ")), record.g.length ? " · " : "");
    for (const flag of record.g) meta.append(make("span", { class: "flag" }, data.flags[flag]));
    const button = make("button", { type: "button" }, meta, make("span", { class: "clip asked", dir: "auto" }, asked));
    NAMES.forEach((name, i) => {
      if (record.a[i]) button.append(make("span", { class: "clip", dir: "auto" }, `${SIGNS[name]}: `, preview(record, name, i)));
    });
    button.onclick = () => { location.hash = `pair=${data.records.indexOf(record)}`; };
    return make("li", {}, button);
  }

  function list() {
    at("list").replaceChildren(...matching.slice(0, visible).map(row));
    at("more").hidden = visible >= matching.length;
    at("more").textContent = `Show ${Math.min(PAGE, matching.length - visible)} more of ${(matching.length - visible).toLocaleString("en")}`;
  }

  // --------------------------------------------------------------------------------- one pair

  let current = -1;

  function text(content, folded, what, cut) {
    const parts = [make("div", { class: "text", dir: "auto" }, content)];
    if (cut) parts.push(make("p", { class: "note" }, `Cut on this page: the whole text has ${cut.toLocaleString("en")} characters.`));
    if (!folded) return make("div", {}, ...parts);
    return make("details", { class: "folded" }, make("summary", {}, `Folded: ${what}. Open`), ...parts);
  }

  function shaded(tokens, scores) {
    const parts = document.createDocumentFragment();
    scores.forEach((score, i) => {
      const depth = Math.min(1, -score / 6);
      const part = make("span", { title: `${score.toFixed(2)} nats`, style: "" }, shown(tokens[i] === undefined ? "" : tokens[i]));
      part.style.background = `rgb(213 94 0 / ${(0.75 * depth).toFixed(3)})`;
      parts.append(part);
    });
    return parts;
  }

  function answer(record, name, index) {
    const box = make("div", { class: name });
    const numbers = [
      ["tokens", record.n[`length_${name}`]], [`avg(${SIGNS[name]}|x)`, record.n[`logp_${name}`]],
    ].map(([title, value]) => `${title}: ${format(value)}`);
    const finish = { stop: "ended by itself", length: "cut at the limit" }[record.finish[name]] || "end not known";
    box.append(make("h3", {}, `${SIGNS[name]}${name === "bad" && record.instructed ? " (asked to be bad)" : ""}`));
    box.append(make("p", { class: "meta" }, [...numbers, finish].join(" · ")));
    if (!record.a[index]) {
      box.append(make("p", {}, "Not stored."));
      return box;
    }
    const folded = record.fold.includes(name);
    const why = record.c.length ? "flagged by a classifier" : "was asked to be bad under Safety";
    const body = text(shown(record.a[index]), folded, `${why}, ${(record.cut[name] || record.a[index].length).toLocaleString("en")} characters`, record.cut[name]);
    box.append(body);
    const known = Object.keys(PROMPTS).filter((context) => record.scores && record.scores[`${context}/${name}`]);
    if (known.length) {
      const place = body.querySelector(".text");
      const group = make("fieldset", { class: "meta" }, make("legend", {}, "Shade each token by its log-probability"));
      for (const choice of ["", ...Object.keys(PROMPTS)]) {
        const input = make("input", { type: "radio", name: `shade-${name}`, checked: !choice, disabled: Boolean(choice) && !known.includes(choice) });
        input.onchange = () => place.replaceChildren(choice ? shaded(record.tokens[name], record.scores[`${choice}/${name}`]) : shown(record.a[index]));
        group.append(make("label", { class: "choice" }, input, choice ? `under ${PROMPTS[choice]}${known.includes(choice) ? "" : " (not stored)"}` : "none"));
      }
      body.append(group);
    }
    for (const [kind, says] of [["leak", "shows its principle"], ["duplicate", "same as the answer of"]]) {
      const note = record.notes[`${kind}_${name}`];
      if (note) box.append(make("p", { class: "meta" }, `${says}: `, folded && kind === "leak" ? "(folded)" : make("bdi", {}, shown(note))));
    }
    return box;
  }

  function open(index) {
    const record = data.records[index];
    if (!record) return;
    current = index;
    const run = data.runs[record.r];
    const body = at("pair-body");
    at("pair-title").replaceChildren(make("bdi", {}, shown(record.id)), ` in ${label(run, run.sets[record.s].name)}`);
    const facts = make("p", { class: "meta" }, shown(`${record.f.length ? record.f.join(", ") : "no features named"} · query from ${record.from[0] || "not known"} · principles from ${record.from[1] || "not known"} · ${record.c.length ? `flagged: ${record.c.join(", ")}` : record.unscreened ? "unscreened: no classifier ran" : "screened, nothing flagged"}`));
    for (const flag of record.g) facts.append(make("span", { class: "flag" }, data.flags[flag]));
    const numbers = [["gap_logp", "gap"], ["contrast_good", "contrast of y+"], ["contrast_bad", "contrast of y-"], ["weight", "W"], ["truth_gap", "exact quality y+ minus y-"]]
      .filter(([key]) => record.n[key] !== undefined).map(([key, title]) => `${title} ${format(record.n[key])}`);
    const fold = record.fold.includes("query");
    const turns = record.q.map(([role, content]) => make("div", {}, make("p", { class: "meta" }, role), text(shown(content), fold, "flagged by a classifier")));
    const [good, bad, goodSystem, badSystem] = record.p.map((i) => data.strings[i]);
    const badFold = record.fold.includes("bad");
    const side = (title, content, folded) => make("div", {}, make("h4", {}, title), content ? text(shown(content), folded, "asks for badness under Safety, or flagged") : make("p", { class: "note" }, "Not stored."));
    const prompts = make("details", {}, make("summary", {}, "The three prompts x, x+, x-"),
      make("div", { class: "three" },
        make("div", {}, make("h4", {}, "x"), make("p", { class: "note" }, "The query above, alone.")),
        side("x+: the query with this system message", goodSystem, fold), side("x-: the query with this system message", badSystem, badFold)));
    const others = data.records.map((other, i) => [other, i]).filter(([other, i]) => other.id === record.id && i !== index);
    const same = make("p", { class: "meta" });
    if (others.length) {
      same.append("The same query: ");
      for (const [other, i] of others) {
        const where = label(data.runs[other.r], data.runs[other.r].sets[other.s].name);
        same.append(make("a", { href: `#pair=${i}` }, where), " ");
      }
    }
    const missing = record.scores ? [] : [make("p", { class: "note" },
      "Log-probabilities of single tokens were not stored; a run with pairs.token_scores: true stores them.")];
    body.replaceChildren(facts, make("p", {}, numbers.join(" · ")), make("h3", {}, "Query"), ...turns,
      make("div", { class: "three" }, side("p+: good principle", good, fold), side("p-: bad principle", bad, badFold)), prompts,
      make("div", { class: "three" }, ...NAMES.map((name, i) => answer(record, name, i))), ...missing, same);
    if (!at("pair").open) at("pair").showModal();
    at("pair").scrollTop = 0;
    const place = matching.indexOf(record);
    at("previous").disabled = place <= 0;
    at("next").disabled = place < 0 || place >= matching.length - 1;
  }

  function step(by) {
    const next = matching[matching.indexOf(data.records[current]) + by];
    if (next && matching.includes(data.records[current])) location.hash = `pair=${data.records.indexOf(next)}`;
  }

  function follow() {
    const match = /^#pair=(\d+)$/.exec(location.hash);
    if (match) open(Number(match[1]));
    else if (at("pair").open) at("pair").close();
  }

  // ------------------------------------------------------------------------------------ start

  let opener = null;
  addEventListener("hashchange", follow);
  document.addEventListener("click", (event) => {
    const link = event.target.closest("a[href^='#pair='], #list button");
    if (link && !at("pair").open) opener = link;
  }, true);
  at("pair").addEventListener("close", () => {
    history.replaceState(null, "", location.pathname + location.search);
    if (opener && opener.isConnected) opener.focus();
  });
  at("close").onclick = () => at("pair").close();
  at("previous").onclick = () => step(-1);
  at("next").onclick = () => step(1);
  at("more").onclick = () => {
    const first = visible;
    visible += PAGE;
    list();
    at("list").children[first]?.firstChild.focus();
  };
  at("direction").onclick = () => {
    largest = !largest;
    at("direction").setAttribute("aria-pressed", String(largest));
    filter();
  };
  let timer = 0;
  at("filters").addEventListener("submit", (event) => {
    event.preventDefault();
    clearTimeout(timer);
    filter();
  });
  at("search").oninput = () => { clearTimeout(timer); timer = setTimeout(filter, 120); };
  for (const id of ["f-run", "f-set", "f-feature", "f-flag", "sort"]) at(id).onchange = filter;
  at("theme").onclick = () => setTheme(THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length]);
  addEventListener("keydown", (event) => {
    const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName);
    if (at("pair").open && !typing) {
      if (event.key === "ArrowLeft") step(-1);
      if (event.key === "ArrowRight") step(1);
    } else if (event.key === "/" && !typing && !at("pair").open) {
      event.preventDefault();
      at("search").focus();
    }
  });

  fillFilters();
  filter();
  setTheme(theme);
  follow();
  document.documentElement.dataset.ready = "true";
})();
