// The explorer of one layer. Data arrive as scripts that call neurocodec.push, so that pages work from a disk.
// What corpus, model or labeller wrote becomes text nodes and attributes of text, never markup.
"use strict";
(() => {
  const SHARD = 256, ROW = 52, FORMAT = 1;
  const DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
  const DIGIT = Object.fromEntries([...DIGITS].map((c, i) => [c, i]));
  const view = { index: null, row: new Map(), order: [], at: -1, group: null, tab: "list", query: "", shards: new Map(), whole: false };
  const $ = (id) => document.getElementById(id);

  // --- elements: strings become text nodes ---------------------------------------------------------------------
  const add = (node, props, children) => {
    for (const [k, v] of Object.entries(props || {})) {
      if (v === undefined || v === null || v === false) continue;
      if (k === "on") for (const [event, f] of Object.entries(v)) node.addEventListener(event, f);
      else if (k === "style") for (const [name, value] of Object.entries(v)) node.style.setProperty(name, value);
      else node.setAttribute(k, v);
    }
    for (const c of children.flat(9)) if (c !== null && c !== undefined && c !== false) node.append(c);
    return node;
  };
  const el = (tag, props, ...children) => add(document.createElement(tag), props, children);
  const svg = (tag, props, ...children) => add(document.createElementNS("http://www.w3.org/2000/svg", tag), props, children);

  const number = (x) => x.toLocaleString("en-US");
  const digits = (x, n = 3) => x === 0 ? "0" : Math.abs(x) >= 1000 ? number(Math.round(x)) : Number(x.toPrecision(n)).toString();
  const percent = (a, n) => n ? (a && a / n < .0001 ? "< 0.01" : (100 * a / n).toFixed(2)) + " %" : "—";
  const missing = (x) => x === null || x === undefined;

  // A token as it can be seen: line ends and what is invisible or turns the writing direction are spelled out,
  // and a mark that combines with what stands before it gets a circle of its own to stand on.
  const SIGNS = { "\n": "↵", "\r": "␍", "\t": "⇥" };
  const UNSEEN = /[\u0000-\u001f\u007f-\u009f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff\ufff9-\ufffb]/g;
  const visible = (text) => {
    const seen = text.replace(UNSEEN, (c) => SIGNS[c] || `⟨${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`);
    return /^\p{M}/u.test(seen) ? "◌" + seen : seen;
  };
  const quoted = (text) => visible(text).replace(/^ +| +$/g, (s) => "␣".repeat(s.length)) || "∅";

  // --- data: an index, and shards of 256 features that are fetched when one of them is opened ------------------
  window.neurocodec = { push(part) { part.kind === "index" ? start(part) : arrived(part); } };

  const CONTEXT = ["kind", "doc", "place", "value", "copies", "tokens", "acts"];
  const arrived = (part) => {
    for (const f of part.features) if (f.contexts) f.contexts = f.contexts.map((c) => Object.fromEntries(CONTEXT.map((k, i) => [k, c[i]])));
    const waiting = view.shards.get(part.number);
    view.shards.set(part.number, part);
    if (waiting && waiting.then) waiting.ready(part);
  };
  const shard = (i) => {
    const have = view.shards.get(i);
    if (have) return have;
    let ready, failed;
    const promise = new Promise((yes, no) => { ready = yes; failed = no; });
    view.shards.set(i, Object.assign(promise, { ready }));
    const script = el("script", { src: `shard-${String(i).padStart(3, "0")}.js`, on: { error: () => { view.shards.delete(i); failed(new Error("missing")); } } });
    document.head.append(script);
    return promise;
  };
  const unpack = (text, width) => {
    const out = [];
    for (let i = 0; i < text.length; i += width) {
      let v = 0;
      for (let j = 0; j < width; j++) v = v * 64 + DIGIT[text[i + j]];
      out.push(v);
    }
    return out;
  };

  // --- the list: search, sort, filter; only the rows in sight are in the page ----------------------------------
  const gain = (i) => {
    const t = view.index.columns;
    return t.detection && !missing(t.detection[i]) && !missing(t.null_detection[i]) ? t.detection[i] - t.null_detection[i] : -9;
  };
  const last = (x, way) => missing(x) ? Infinity : way * x;
  const SORTS = {
    feature: { name: "feature number", key: (i, t) => t.feature[i] },
    effect: { name: "effect, strongest first", needs: "rank", key: (i, t) => last(t.rank[i], 1) },
    label: { name: "label, clearest over null first", needs: "detection", key: (i) => -gain(i) },
    often: { name: "density, high first", key: (i, t) => -t.count[i] },
    rare: { name: "density, low first", key: (i, t) => t.count[i] },
    max: { name: "largest activation first", key: (i, t) => last(t.max[i], -1) },
    one: { name: "most of one token first", key: (i, t) => last(t.share[i], -1) },
    theme: { name: "theme, its strongest first", needs: "theme", key: (i, t) => missing(t.theme[i]) ? Infinity : t.theme[i] + 1 - (t.membership[i] || 0) },
  };
  const FLAGS = { dead: "dead", dense: "dense", single: "one token" };
  const FILTERS = {
    all: { name: "all features", test: () => true },
    confident: { name: "labelled with confidence", needs: "confident", test: (i, t) => t.confident[i] === 1 },
    unsure: { name: "label not above its bar", needs: "confident", test: (i, t) => t.confident[i] === 0 },
    bare: { name: "without a label", needs: "label", test: (i, t) => !t.label[i] },
    plain: { name: "without a warning", test: (i, t) => !t.flags[i].length },
    ...Object.fromEntries(Object.entries(FLAGS).map(([k, name]) => [k, { name: `warning: ${name}`, test: (i, t) => t.flags[i].includes(k) }])),
  };

  const search = () => {
    const t = view.index.columns, words = view.query.toLowerCase().split(/\s+/).filter(Boolean), keep = FILTERS[$("filter").value].test;
    const found = [];
    for (let i = 0; i < t.feature.length; i++) {
      const text = view.text[i];
      if (words.every((w) => text.includes(w)) && keep(i, t)) found.push(i);
    }
    const { key } = SORTS[$("sort").value], keys = found.map((i) => key(i, t)), exact = Number(view.query);
    const place = keys.map((_, j) => j).sort((a, b) => keys[a] - keys[b] || found[a] - found[b]).map((j) => found[j]);
    const hit = view.query.trim() && view.row.get(exact);
    view.order = hit === undefined || hit === "" ? place : [hit, ...place.filter((i) => i !== hit)];
    view.shown = new Set(view.order);
    $("rows").scrollTop = 0;
    count(view.order.length, t.feature.length, "features");
    rows();
    if (view.tab !== "list") TABS[view.tab].draw();
  };

  const count = (n, all, what) => { $("found").textContent = n === all ? `${number(all)} ${what}` : `${number(n)} of ${number(all)}`; };

  const row = (i, place) => {
    const t = view.index.columns, label = t.label && t.label[i], name = label || t.words[i].map(quoted).join("  ");
    const score = t.detection && !missing(t.detection[i]) ? `${(100 * t.detection[i]).toFixed(0)}` : "";
    const nothing = t.null_detection && !missing(t.null_detection[i]) ? `${(100 * t.null_detection[i]).toFixed(0)}` : "";
    return el("a", { class: "row" + (i === view.at ? " now" : ""), href: `#${view.tab}/${t.feature[i]}`, "data-feature": t.feature[i], style: { top: `${place * ROW}px` }, "aria-current": i === view.at ? "true" : null },
      el("span", { class: "id" }, `${t.feature[i]}`),
      el("span", { class: "what" },
        el("span", { class: label ? "label" : "label words", dir: "auto" }, visible(name) || "silent"),
        el("span", { class: "words" }, label ? t.words[i].map(quoted).join("  ") : "", t.flags[i].map((f) => el("i", { class: "flag" }, FLAGS[f])))),
      el("span", { class: "score", title: t.detection ? "detection: balanced accuracy of the label, and of the deranged labels that this feature was given" : "share of positions where it is active" },
        score ? [el("b", {}, score), el("span", {}, ` / ${nothing || "—"}`)] : el("span", {}, t.detection ? "—" : percent(t.count[i], view.index.seen))));
  };
  const rows = () => {
    const box = $("rows"), first = Math.max(0, Math.floor(box.scrollTop / ROW) - 6), n = Math.ceil((box.clientHeight || innerHeight) / ROW) + 12;
    const shown = view.order.slice(first, first + n).map((i, j) => row(i, first + j));
    $("sheet").style.height = `${view.order.length * ROW}px`;
    $("sheet").replaceChildren(...shown);
    $("none").hidden = view.order.length > 0;
  };

  // --- the page of a feature -----------------------------------------------------------------------------------
  const section = (title, help, ...children) => el("section", {}, el("h2", {}, title), help && el("p", { class: "help" }, help), ...children);
  const link = (feature) => {
    const i = view.row.get(feature), t = view.index.columns;
    if (i === undefined) return el("span", { class: "name" }, `${feature} (not published)`);
    return el("a", { class: "name", href: `#${view.tab}/${feature}` }, el("span", { class: "id" }, `${feature}`), " ", el("bdi", {}, visible((t.label && t.label[i]) || t.words[i].map(quoted).join(" ")) || "silent"));
  };

  // value and null on one axis from guessing (0.5) to always right; grey is the deranged label, the stroke the bar that 95 % of those of its group stay below
  const scale = (name, value, nothing, bar) => {
    const at = (v) => 8 + 184 * (Math.max(.3, Math.min(1, v)) - .3) / .7;
    return el("div", { class: "scale" }, el("span", { class: "key" }, name),
      svg("svg", { viewBox: "0 0 200 22", role: "img", "aria-label": `${name} ${digits(value)}, deranged ${missing(nothing) ? "not measured" : digits(nothing)}${missing(bar) ? "" : `, bar ${digits(bar)}`}` },
        svg("line", { x1: at(.3), x2: at(1), y1: 11, y2: 11, class: "axis" }), svg("line", { x1: at(.5), x2: at(.5), y1: 5, y2: 17, class: "axis" }),
        !missing(bar) && svg("line", { x1: at(bar), x2: at(bar), y1: 2, y2: 20, class: "bar-at" }), !missing(nothing) && svg("circle", { cx: at(nothing), cy: 11, r: 4.5, class: "null" }), svg("circle", { cx: at(value), cy: 11, r: 5, class: "dot" })),
      el("span", {}, el("b", {}, value.toFixed(2)), el("span", { class: "quiet" }, missing(nothing) ? "" : ` deranged ${nothing.toFixed(2)}`, missing(bar) ? "" : `, bar ${bar.toFixed(2)}`)));
  };
  const labelled = (i) => {
    const t = view.index.columns;
    if (!t.label) return null;
    const words = [t.labeller[i] && `by ${t.labeller[i]}`, !missing(t.n[i]) && `n = ${t.n[i]}`,
      t.confident[i] === 1 ? "above the bar: better than 95 % of deranged labels" : t.confident[i] === 0 ? "not above the bar that 95 % of deranged labels stay below" : null].filter(Boolean);
    return el("div", { class: "scores" },
      !missing(t.detection[i]) && scale("detection", t.detection[i], t.null_detection[i], t.bar && t.bar[i]),
      !missing(t.fuzzing[i]) && scale("fuzzing", t.fuzzing[i], t.null_fuzzing[i]),
      el("p", { class: "quiet" }, visible(words.join(" · ")), t.failure[i] && el("span", { class: "failure" }, ` · ${visible(t.failure[i])}`)));
  };
  const fact = (name, value, more) => el("div", { class: "fact" }, el("dt", {}, name), el("dd", {}, value, more && el("span", { class: "quiet" }, more)));
  // The first number is a mean over all occurrences; what a few ablations gave is set beside the attribution at the same places.
  const effects = (i) => {
    const t = view.index.columns, n = t.n_exact && t.n_exact[i];
    const on = (kind) => ["model", "decoder"].filter((name) => t[`${kind}_${name}`] && !missing(t[`${kind}_${name}`][i])).map((name) => `${digits(t[`${kind}_${name}`][i])} (${name})`).join(", ");
    const all = on("attribution"), ablated = on("exact"), there = on("attribution_at_exact");
    return [all && `, attributed ${all} on average`, ablated ? `; ablated at ${n ? number(n) : "a few"} ${n === 1 ? "place" : "places"} ${ablated}` : "; not ablated", ablated && there && `, attributed there ${there}`];
  };
  const facts = (i, f) => {
    const t = view.index.columns, seen = view.index.seen, c = f.control;
    const effect = t.rank && !missing(t.rank[i]) ? fact("effect", `rank ${number(t.rank[i])} of ${number(view.index.total)}`, effects(i)) : null;
    return el("dl", { class: "facts" },
      t.theme && !missing(t.theme[i]) && fact("theme", themeLink(view.index.themes.find((x) => x.theme === t.theme[i])), ` membership ${digits(t.membership[i], 2)}`),
      t.neurons && t.neurons[i].length > 0 && fact("neurons", t.neurons[i].map(([m, w], j) => [j > 0 && "  ", neuronLink(m), el("span", { class: "quiet" }, ` ${w < 0 ? "−" : "+"}${digits(Math.abs(w), 2)}`)]), ", and how much of it comes back through each"),
      fact("active", `${number(t.count[i])} of ${number(seen)}`, ` positions, ${percent(t.count[i], seen)}`),
      !missing(t.share[i]) && fact("top token", `${(100 * t.share[i]).toFixed(0)} %`, [" of firings are on ", el("code", {}, quoted(t.words[i].length ? t.common[i] : ""))]),
      effect,
      c && fact("control", "a random direction", [` active at as many of ${number(view.index.sample)} sampled positions (${number(c.count)}): ${(100 * c.share).toFixed(0)} % on one token, best partner at r = ${c.partner.toFixed(2)}; `, el("code", {}, c.words.map(quoted).join("  "))]));
  };
  const logits = (f) => {
    const low = f.logits.low.toSorted((a, b) => a[1] - b[1]), high = f.logits.high.toSorted((a, b) => b[1] - a[1]), most = Math.max(...[...low, ...high].map(([, v]) => Math.abs(v)), 1e-9);
    const bar = (kind) => ([word, v]) => el("li", { class: kind }, el("i", { style: { width: `${(68 * Math.abs(v) / most).toFixed(1)}%` } }), el("code", {}, el("bdi", {}, quoted(word))), el("span", {}, `${v > 0 ? "+" : "−"}${Math.abs(v).toFixed(2)}`));
    return section("Effect on the next token", "Tokens whose logit its direction lowers and raises most, through the final norm's weights and the unembedding.",
      el("div", { class: "logits" }, el("ol", {}, low.map(bar("low"))), el("ol", {}, high.map(bar("high")))));
  };
  const histogram = (f, max) => {
    const n = f.histogram.length, most = Math.max(...f.histogram, 1), W = 600, H = 90;
    const bars = f.histogram.map((c, i) => svg("rect", { x: i * W / n + .5, width: W / n - 1, y: H - (c ? Math.max(1.5, H * c / most) : 0), height: c ? Math.max(1.5, H * c / most) : 0, style: { "fill-opacity": .3 + .7 * i / n } },
      svg("title", {}, `${digits(i * max / n)} to ${digits((i + 1) * max / n)}: ${number(c)}`)));
    return section("Positive activations", `${number(f.histogram.reduce((a, b) => a + b, 0))} of them in ${n} bins; zeros are not drawn. Most in a bin: ${number(most)}.`,
      svg("svg", { class: "histogram", viewBox: `0 0 ${W} ${H + 1}`, preserveAspectRatio: "none", role: "img", "aria-label": "histogram of positive activations" }, svg("line", { x1: 0, x2: W, y1: H + .5, y2: H + .5, class: "axis" }), bars),
      el("div", { class: "ends" }, el("span", {}, "0"), el("span", {}, digits(max))));
  };

  // A context is one line with its peak in the middle, as in a concordance, and unfolds when it is clicked.
  const tokens = (part, c, max) => {
    const ids = unpack(c.tokens, part.width), acts = unpack(c.acts, 1), line = el("div", { class: "text", dir: "ltr" });
    const token = (k, whole) => {
      const text = part.vocabulary[ids[k]], act = k === c.place ? c.value : acts[k] * max / 63, opacity = act > 0 ? .05 + .95 * Math.log10(1 + 9 * Math.min(1, act / max)) : 0;
      const span = el("span", { class: "token" + (opacity > .55 ? " strong" : "") + (k === c.place ? " peak" : ""), title: act > 0 ? `${quoted(text)}  ${digits(act, 4)}` : null, style: opacity ? { "--o": opacity.toFixed(3) } : null }, visible(whole ? text : text.replace(/ {2,}/g, " ")) || "∅");
      return whole && /[\n\r]$/.test(text) ? [span, el("br", {})] : [span];
    };
    const fill = (whole) => {
      const every = ids.map((_, k) => token(k, whole)), part = (a, b) => every.slice(a, b).flat();
      line.classList.toggle("whole", whole);
      line.replaceChildren(...whole ? part() : [el("span", { class: "before" }, el("span", {}, part(0, c.place))), ...part(c.place, c.place + 1), el("span", { class: "after" }, part(c.place + 1))]);
    };
    fill(view.whole);
    line.addEventListener("click", () => { if (!getSelection().toString()) fill(!line.classList.contains("whole")); });
    return line;
  };
  const contexts = (part, f, max) => {
    const groups = [...new Set(f.contexts.map((c) => c.kind))].sort((a, b) => a - b);
    const name = (k) => {
      if (k === 0) return ["Top activations", ""];
      const [low, high, share] = f.intervals[k - 1] || [];
      return missing(low) ? [`Interval ${k}`, ""] : [`Interval ${digits(low)} to ${digits(high)}`, missing(share) ? "" : `${(100 * share).toFixed(1)} % of its activations`];
    };
    const width = el("button", { type: "button", class: "plain", on: { click: () => { view.whole = !view.whole; show(); } } }, view.whole ? "fold all" : "unfold all");
    return el("section", { class: "contexts" }, el("h2", {}, "Contexts", width),
      el("p", { class: "help" }, "The stronger a token's ground, the more active the feature is there; the outlined token is the peak. Click a line to unfold it. Identical windows are shown once."),
      groups.map((k) => el("div", { class: "group" }, el("h3", {}, name(k)[0], el("span", { class: "quiet" }, name(k)[1])),
        f.contexts.filter((c) => c.kind === k).map((c) => el("div", { class: "context" },
          el("span", { class: "value", title: `document ${c.doc}` }, digits(c.value), c.copies > 1 && el("span", { class: "quiet" }, ` ×${c.copies}`)), tokens(part, c, max))))));
  };
  const relatives = (f) => el("div", { class: "pair" },
    f.similar && section("Similar directions", "Cosine of decoder directions, over all features.", el("ol", { class: "list" }, f.similar.map(([g, c]) => el("li", {}, link(g), el("span", { class: "value" }, c.toFixed(2)))))),
    f.coactive && section("Active together", "Correlation of activations; in brackets joint firings, and how many chance would give.",
      el("ol", { class: "list" }, f.coactive.map(([g, r, joint, expected]) => el("li", {}, link(g), el("span", { class: "value" }, r.toFixed(2), el("span", { class: "quiet" }, ` (${number(joint)}, ${digits(expected, 2)})`)))))));

  // --- themes and neurons --------------------------------------------------------------------------------------
  const COLOURS = ["#3b7dd8", "#d9822b", "#2f9e6e", "#c2508f", "#7b61c9", "#b59a1f", "#20a0b5"];  // in turn: a colour is shared by several themes, the hint says which
  const colour = (theme) => COLOURS[theme % COLOURS.length];
  const dot = (theme) => svg("svg", { viewBox: "0 0 10 10", class: "swatch", "aria-hidden": "true" }, svg("circle", { cx: 5, cy: 5, r: 5, style: { fill: colour(theme) } }));
  const themeLink = (x) => el("a", { class: "name", href: `#${view.tab}/t${x.theme}` }, dot(x.theme), " ", el("bdi", {}, visible(x.name)));
  const neuronLink = (m) => el("a", { href: `#${view.tab}/n${m}` }, `n${m}`);
  const current = () => view.group && view.group.kind === "t" ? view.index.themes.find((x) => x.theme === view.group.number) : undefined;
  const readBy = (m) => view.index.columns.feature.map((f, i) => [i, (view.index.columns.neurons[i].find(([k]) => k === m) || [])[1]]).filter(([, w]) => !missing(w)).sort((a, b) => Math.abs(b[1]) - Math.abs(a[1]));
  const tally = (keys) => [...keys.reduce((m, k) => m.set(k, (m.get(k) || 0) + 1), new Map())].sort((a, b) => b[1] - a[1] || a[0] - b[0]);
  const themeRows = () => {
    const open = current(), words = view.query.toLowerCase().split(/\s+/).filter(Boolean);
    view.themes = view.index.themes.filter((x) => { const text = `${x.name} ${x.domain || ""} theme ${x.theme}`.toLowerCase(); return words.every((w) => text.includes(w)) || words.length > 0 && x.features.some((f) => view.shown.has(view.row.get(f))); });
    count(view.themes.length, view.index.themes.length, "themes");
    $("theme-rows").replaceChildren(...(view.themes.length ? view.themes.map((x) => el("a", { class: "theme" + (x === open ? " now" : ""), href: `#${view.tab}/t${x.theme}`, "data-theme-number": x.theme, "aria-current": x === open ? "true" : null },
      dot(x.theme), el("span", { class: "what" }, el("span", { class: "label", dir: "auto" }, visible(x.name)),
        el("span", { class: "quiet" }, `${number(x.features.length)} features`, x.domain && [" · singles out ", el("bdi", {}, visible(x.domain))])),
      el("span", { class: "score", title: "stability, and that of 95 % of the groups in clouds without groups" }, el("b", {}, x.stability.toFixed(2)), ` / ${x.null_stability.toFixed(2)}`))) : [el("p", { class: "quiet none" }, "Nothing found.")]));
  };
  const ruler = (name, value, nothing) => {
    const at = (v) => 8 + 184 * Math.max(0, Math.min(1, v));
    return el("div", { class: "scale" }, el("span", { class: "key" }, name),
      svg("svg", { viewBox: "0 0 200 22", role: "img", "aria-label": `${name} ${digits(value)}, null ${digits(nothing)}` }, svg("line", { x1: at(0), x2: at(1), y1: 11, y2: 11, class: "axis" }),
        svg("circle", { cx: at(nothing), cy: 11, r: 4.5, class: "null" }), svg("circle", { cx: at(value), cy: 11, r: 5, class: "dot" })),
      el("span", {}, el("b", {}, value.toFixed(2)), el("span", { class: "quiet" }, ` null ${nothing.toFixed(2)}`)));
  };
  const turn = (list, at, kind) => [-1, 1].map((by) => el("button", { type: "button", title: by < 0 ? "previous" : "next", "aria-label": by < 0 ? "previous" : "next", on: { click: () => { const to = list[at + by]; if (to !== undefined) location.hash = `${view.tab}/${kind}${to}`; } } }, by < 0 ? "‹" : "›"));
  const close = () => el("button", { type: "button", title: "back to the list (Escape)", "aria-label": "back to the list (Escape)", on: { click: () => go(null) } }, "×");
  const members = (list) => el("ol", { class: "list" }, list.map(([f, value]) => el("li", {}, link(f), el("span", { class: "value" }, value))));
  const themePage = (x) => {
    const t = view.index.columns, at = x.features.filter((f) => view.row.has(f)).map((f) => view.row.get(f)), numbers = view.index.themes.map((y) => y.theme);
    const neurons = t.neurons ? tally(at.flatMap((i) => t.neurons[i].map(([m]) => m))) : [];
    return [el("header", {}, dot(x.theme), el("span", { class: "id" }, `Theme ${x.theme}`), el("span", { class: "steps" }, turn(numbers, numbers.indexOf(x.theme), "t"), close())),
      el("h1", { dir: "auto", class: x.name.length > 70 ? "long" : "" }, visible(x.name)),
      el("div", { class: "scores" }, ruler("stability", x.stability, x.null_stability),
        el("p", { class: "quiet" }, "How much of it is found again when a fifth of the features is left out, beside 95 % of the groups in clouds of the same covariance that have none.")),
      el("dl", { class: "facts" }, fact("features", number(x.features.length), at.length < x.features.length ? `, ${number(at.length)} of them published here` : ""),
        x.domain ? fact("domain", el("bdi", {}, visible(x.domain)), ` is singled out on other documents, AUROC ${x.auroc.toFixed(2)}`) : fact("domain", "none singled out", missing(x.auroc) ? ", for there were none to tell" : `; the one chosen for it has AUROC ${x.auroc.toFixed(2)} on other documents, and random groups come about as far`),
        neurons.length > 0 && fact("neurons", neurons.slice(0, 8).map(([m, n], j) => [j > 0 && "  ", neuronLink(m), el("span", { class: "quiet" }, ` ×${n}`)]), ", which carry so many of its features")),
      section("Features", "By membership: how close each is to the middle of the theme.", members(x.features.map((f) => [f, view.row.has(f) && !missing(t.membership[view.row.get(f)]) ? t.membership[view.row.get(f)].toFixed(2) : ""])))];
  };
  const neuronPage = (m, found) => {
    const t = view.index.columns, all = [...new Set(t.neurons.flat().map(([k]) => k))].sort((a, b) => a - b), groups = tally(found.map(([i]) => t.theme[i]).filter((x) => !missing(x)));
    return [el("header", {}, el("span", { class: "id" }, `Neuron ${m}`), el("span", { class: "steps" }, turn(all, all.indexOf(m), "n"), close())),
      el("h1", {}, `Carries ${number(found.length)} features of ${number(groups.length)} themes`),
      el("p", { class: "help" }, "A neuron of the bottleneck that was trained to hold these features; shown are those for which it is among the three through which most comes back."),
      section("Themes", "With the number of features.", el("ol", { class: "list" }, groups.map(([k, n]) => el("li", {}, themeLink(view.index.themes.find((x) => x.theme === k)), el("span", { class: "value" }, `×${n}`))))),
      section("Features", "With how much of each comes back through it: the product of the weights in and out.", members(found.map(([i, w]) => [t.feature[i], `${w < 0 ? "−" : "+"}${digits(Math.abs(w), 2)}`])))];
  };

  const move = (by) => {
    const place = view.order.indexOf(view.at), to = view.order[Math.max(0, Math.min(view.order.length - 1, place < 0 ? 0 : place + by))];
    if (to !== undefined) go(view.index.columns.feature[to]);
  };
  const page = (i, part) => {
    const t = view.index.columns, f = part.features[i % SHARD], label = t.label && t.label[i], max = t.max[i] || 1;
    const button = (text, title, f) => el("button", { type: "button", title, "aria-label": title, on: { click: f } }, text);
    return [
      el("header", {}, el("span", { class: "id" }, `Feature ${t.feature[i]}`), t.flags[i].map((k) => el("i", { class: "flag" }, FLAGS[k])),
        el("span", { class: "steps" }, button("‹", "previous feature (k)", () => move(-1)), button("›", "next feature (j)", () => move(1)),
          button("⤨", "a random feature", () => go(t.feature[view.order[Math.floor(Math.random() * view.order.length)]])), button("×", "back to the list (Escape)", () => go(null)))),
      el("h1", { dir: "auto", class: !label ? "words" : label.length > 70 ? "long" : "" }, visible(label || t.words[i].map(quoted).join("  ")) || "Silent on the sample"),
      labelled(i), facts(i, f), f.logits && logits(f), f.histogram && histogram(f, max), f.contexts && (f.contexts.length ? contexts(part, f, max) : section("Contexts", "No position was found where it is active.")), relatives(f)];
  };
  const show = () => {
    const i = view.at, place = $("feature");
    document.body.classList.toggle("open", i >= 0 || view.group !== null);
    if (i < 0) {
      place.replaceChildren(...(!view.group ? welcome() : view.group.kind === "t" ? themePage(current()) : neuronPage(view.group.number, view.group.found)).filter(Boolean));
      place.scrollTop = 0;
      document.title = view.group ? `${view.group.kind}${view.group.number} · ${view.title}` : view.title;
      return;
    }
    document.title = `${view.index.columns.feature[i]} · ${view.title}`;
    const got = shard(Math.floor(i / SHARD));
    const draw = (part) => { if (view.at === i) { place.replaceChildren(...page(i, part).filter(Boolean)); place.scrollTop = 0; } };
    if (!got.then) return draw(got);
    got.then(draw, () => { if (view.at === i) place.replaceChildren(el("p", { class: "help" }, "The data of this feature are missing beside this page.")); });
  };
  const welcome = () => {
    const t = view.index, c = t.columns, n = c.feature.length, count = (name) => c.flags.filter((f) => f.includes(name)).length;
    const sure = c.confident && c.confident.filter((x) => x === 1).length;
    return [el("h1", {}, `${number(t.total)} features after block ${t.layer}`),
      el("p", { class: "lead" }, `What the dictionary of run ${t.run} finds in ${t.model}, read on ${t.corpus}. Choose a feature from the list or the map.`),
      el("dl", { class: "facts" }, n < t.total && fact("published", number(n), " here, those with the strongest effect"),
        sure !== undefined && fact("named", number(sure), " labels beat 95 % of the deranged ones on other documents"),
        fact("warnings", number(count("dense")), ` dense (active on more than 10 % of positions), ${number(count("dead"))} dead, ${number(count("single"))} with 95 % of their firings on one token`),
        t.themes && fact("themes", number(t.themes.length), ` groups of features, ${number(t.themes.filter((x) => x.stability > x.null_stability).length)} of them firmer than 95 % of the groups in clouds that have none`),
        !missing(t.control_single) && fact("control", number(t.control_single), ` of ${number(t.total)} random directions that fire as often are on one token`)),
      el("p", { class: "help keys" }, el("kbd", {}, "/"), " search  ", el("kbd", {}, "j"), " ", el("kbd", {}, "k"), " or arrows: next, previous  ", el("kbd", {}, "Esc"), " back")];
  };

  // --- the map of directions -----------------------------------------------------------------------------------
  const map = {
    zoom: 1, x: 0, y: 0, over: -1, drag: null,
    ways: { count: ["density", (i, t) => t.count[i] ? Math.max(0, Math.min(1, (Math.log10(t.count[i] / view.index.seen) + 4) / 3)) : 0], gain: ["label over null", (i) => Math.max(0, Math.min(1, gain(i) / .5))], rank: ["effect", (i, t) => missing(t.rank[i]) ? 0 : 1 - Math.log(t.rank[i]) / Math.log(view.index.total + 1)],
      theme: ["theme, in colours", (i, t) => missing(t.theme[i]) ? 0 : 1] },
    at(i) {
      const t = view.index.columns, { width, height } = this.box, size = Math.min(width, height) - 24;
      return [width / 2 + (t.x[i] * size / 2 + this.x) * this.zoom, height / 2 - (t.y[i] * size / 2 + this.y) * this.zoom];
    },
    draw() {
      const canvas = $("canvas"), box = this.box = canvas.getBoundingClientRect(), r = devicePixelRatio || 1, t = view.index.columns;
      if (!box.width) return;
      canvas.width = box.width * r; canvas.height = box.height * r;
      const g = canvas.getContext("2d"), style = getComputedStyle(document.documentElement), ink = style.getPropertyValue("--nc-mark"), pale = style.getPropertyValue("--nc-faint"), strong = style.getPropertyValue("--nc-text");
      const way = $("colour").value, value = this.ways[way][1], open = current();
      const inside = open ? new Set(open.features) : view.group ? new Set(view.group.found.map(([i]) => t.feature[i])) : null;
      g.scale(r, r);
      const dot = (i, size) => { const [x, y] = this.at(i); g.beginPath(); g.arc(x, y, size, 0, 7); };
      for (let i = 0; i < t.feature.length; i++) if (!view.shown.has(i)) { g.globalAlpha = .55; g.fillStyle = pale; dot(i, 1.6); g.fill(); }
      g.fillStyle = ink;
      for (const i of view.order) {
        if (!t.count[i]) { g.globalAlpha = .8; g.strokeStyle = pale; dot(i, 2.2); g.stroke(); continue; }
        const apart = inside && !inside.has(t.feature[i]), themed = t.theme && !missing(t.theme[i]) && (way === "theme" || inside);
        g.fillStyle = apart || way === "theme" && !themed ? pale : themed ? colour(t.theme[i]) : ink;
        g.globalAlpha = apart ? .3 : inside ? 1 : .18 + (way === "theme" ? .6 : .82) * value(i, t); dot(i, inside && !apart ? 4 : apart ? 1.8 : 3); g.fill();
      }
      g.globalAlpha = 1; g.strokeStyle = strong; g.lineWidth = 1.8;
      for (const i of [view.at, this.over]) if (i >= 0) { dot(i, 6); g.stroke(); }
    },
    nearest(event) {
      const box = this.box, px = event.clientX - box.left, py = event.clientY - box.top;
      let best = -1, far = event.pointerType === "touch" ? 400 : 120;
      for (const i of view.order) { const [x, y] = this.at(i), d = (x - px) ** 2 + (y - py) ** 2; if (d < far) { far = d; best = i; } }
      return best;
    },
    hover(i) {
      if (i === this.over) return;
      this.over = i;
      $("hint").replaceChildren(...(i < 0 ? [] : [el("b", {}, `${view.index.columns.feature[i]} `), visible((view.index.columns.label && view.index.columns.label[i]) || view.index.columns.words[i].map(quoted).join("  ")) || "silent",
        view.index.columns.theme && !missing(view.index.columns.theme[i]) && $("colour").value === "theme" && el("span", { class: "quiet" }, ` · theme ${view.index.columns.theme[i]}`)].filter(Boolean)));
      $("canvas").style.cursor = i < 0 ? "" : "pointer";
      this.draw();
    },
    listen() {
      const canvas = $("canvas");
      canvas.addEventListener("pointerdown", (e) => { this.drag = [e.clientX, e.clientY, this.x, this.y, false]; });
      canvas.addEventListener("pointermove", (e) => {
        const d = this.drag;
        if (!d || e.buttons === 0 || e.pointerType === "touch") return this.hover(this.nearest(e));
        if (Math.hypot(e.clientX - d[0], e.clientY - d[1]) > 4) d[4] = true;
        if (d[4]) { this.x = d[2] + (e.clientX - d[0]) / this.zoom; this.y = d[3] - (e.clientY - d[1]) / this.zoom; this.draw(); }
      });
      canvas.addEventListener("pointerup", (e) => { const moved = this.drag && this.drag[4], i = this.nearest(e); this.drag = null; if (!moved && i >= 0) go(view.index.columns.feature[i]); });
      canvas.addEventListener("pointerleave", () => this.hover(-1));
      canvas.addEventListener("wheel", (e) => {
        e.preventDefault();
        const before = this.zoom, px = e.clientX - this.box.left - this.box.width / 2, py = this.box.top + this.box.height / 2 - e.clientY;
        this.zoom = Math.max(1, Math.min(20, before * Math.exp(-e.deltaY / 400)));
        this.x += px / this.zoom - px / before; this.y += py / this.zoom - py / before;
        if (this.zoom === 1) this.x = this.y = 0;
        this.draw();
      }, { passive: false });
      canvas.addEventListener("dblclick", () => { this.zoom = 1; this.x = this.y = 0; this.draw(); });
    },
  };

  // --- tabs, addresses, keys -----------------------------------------------------------------------------------
  const TABS = { list: { name: "List", draw: () => rows() }, map: { name: "Map", draw: () => map.draw() }, themes: { name: "Themes", needs: "themes", draw: () => themeRows() } };  // one more tab is one more entry and one more panel
  const shown = (o) => !o.needs || view.index[o.needs];
  const group = (word) => {  // t3 is a theme, n12 a neuron
    const [, kind, digits] = /^([tn])(\d+)$/.exec(word) || [], number = Number(digits), found = kind === "n" && view.index.columns.neurons ? readBy(number) : [];
    return kind && (kind === "t" ? (view.index.themes || []).some((x) => x.theme === number) : found.length) ? { kind, number, found } : null;
  };
  const go = (feature, tab = view.tab) => { location.hash = feature === null ? tab : `${tab}/${feature}`; };
  const route = () => {
    const [tab, feature] = location.hash.slice(1).split("/"), i = view.row.get(feature === undefined || feature === "" ? NaN : Number(feature));
    view.tab = Object.hasOwn(TABS, tab) && shown(TABS[tab]) ? tab : "list";
    view.at = i === undefined ? -1 : i;
    view.group = group(feature || "");
    for (const k of Object.keys(TABS)) if (shown(TABS[k])) { $(`tab-${k}`).setAttribute("aria-selected", k === view.tab); $(`panel-${k}`).hidden = k !== view.tab; }
    document.body.dataset.tab = view.tab;
    count(view.order.length, view.index.columns.feature.length, "features");
    const place = view.order.indexOf(view.at), box = $("rows");
    if (view.tab === "list" && place >= 0 && box.clientHeight) {
      if (place * ROW < box.scrollTop) box.scrollTop = place * ROW;
      else if ((place + 1) * ROW > box.scrollTop + box.clientHeight) box.scrollTop = (place + 1) * ROW - box.clientHeight;
    }
    show();
    TABS[view.tab].draw();
  };
  const keys = (e) => {
    const inside = ["INPUT", "SELECT", "TEXTAREA"].includes(e.target.tagName);
    if (e.ctrlKey || e.metaKey || e.altKey) return;
    if (e.key === "Escape") {
      if (inside && e.target.value && e.target.id === "query") { e.target.value = view.query = ""; search(); }
      else if (inside) e.target.blur();
      else if (view.at >= 0 || view.group) go(null);
    } else if (inside && e.target.id === "query" && (e.key === "Enter" || e.key === "ArrowDown")) { e.target.blur(); if (view.order.length) go(view.index.columns.feature[view.order[0]]); }
    else if (inside) return;
    else if (e.key === "/") $("query").focus();
    else if (e.key === "j" || e.key === "ArrowDown" || e.key === "ArrowRight") move(1);
    else if (e.key === "k" || e.key === "ArrowUp" || e.key === "ArrowLeft") move(-1);
    else return;
    e.preventDefault();
  };

  const theme = () => {  // the book's own switch, where it was used; else the system's
    let mode = "";
    try { mode = localStorage.getItem("mode") || ""; } catch (e) { /* refused from a disk: the system decides */ }
    if (mode === "light" || mode === "dark") document.documentElement.dataset.theme = mode;
  };
  const options = (select, entries) => select.append(...entries.map(([k, name]) => el("option", { value: k }, name)));
  const start = (index) => {
    const t = index.columns, has = ([, o]) => !o.needs || t[o.needs];
    if (index.format !== FORMAT) { document.body.prepend(el("p", { class: "help" }, `These data have format ${index.format}, this page reads ${FORMAT}; run chapter 50_explorer again.`)); return; }
    view.index = index;
    view.title = document.title;
    t.feature.forEach((f, i) => view.row.set(f, i));
    view.text = t.feature.map((f, i) => `${(t.label && t.label[i]) || ""} ${t.words[i].join(" ")} ${f}`.toLowerCase());
    $("app").hidden = false;
    const open = () => view.at >= 0 ? t.feature[view.at] : view.group ? view.group.kind + view.group.number : null;
    $("tabs").append(...Object.entries(TABS).filter(([, o]) => shown(o)).map(([k, o]) => el("button", { type: "button", role: "tab", id: `tab-${k}`, "aria-controls": `panel-${k}`, on: { click: () => go(open(), k) } }, o.name)));
    options($("sort"), Object.entries(SORTS).filter(has).map(([k, o]) => [k, o.name]));
    options($("filter"), Object.entries(FILTERS).filter(has).map(([k, o]) => [k, o.name]));
    options($("colour"), Object.entries(map.ways).filter(([k]) => k === "count" || t[k === "gain" ? "detection" : k]).map(([k, [name]]) => [k, name]));
    $("head").append(el("span", {}, "feature"), el("span", {}, t.label ? "label, tokens" : "tokens"), el("span", {}, t.detection ? "detection / deranged, %" : "density"));
    if (t.theme) $("colour").value = "theme";
    $("sort").value = t.rank ? "effect" : t.detection ? "label" : "feature";
    $("query").addEventListener("input", (e) => { view.query = e.target.value; search(); });
    for (const id of ["sort", "filter"]) $(id).addEventListener("change", search);
    $("colour").addEventListener("change", () => map.draw());
    $("rows").addEventListener("scroll", rows, { passive: true });
    map.listen();
    addEventListener("hashchange", route);
    addEventListener("keydown", keys);
    addEventListener("resize", () => TABS[view.tab].draw());
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => TABS[view.tab].draw());
    search();
    route();
    document.documentElement.dataset.ready = Math.round(performance.now());
  };
  theme();
})();
