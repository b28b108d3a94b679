"""Visualizes `inspect_text`'s record: the text colored by its strongest memory state, and what each state is used for."""

from __future__ import annotations

import json
from html import escape
from typing import TYPE_CHECKING

from factorization_memory.reports.pages import page

if TYPE_CHECKING:
    from factorization_memory.runs.inspection_record import HeadInspection, InspectionRecord, LayerInspection, TokenStates

INSPECTION_STYLE = """
.inspect { margin-top: 1.5rem; }
.inspect .bar { display: flex; flex-wrap: wrap; gap: .6rem 1.6rem; align-items: center; margin-bottom: 1rem; }
.inspect .choice { display: flex; align-items: center; gap: .55rem; color: var(--soft); font-size: .82rem; }
.inspect .choice > div { display: flex; border: 1px solid var(--line); border-radius: 7px; overflow: hidden;
  background: var(--card); }
.inspect .choice button { font: inherit; font-variant-numeric: tabular-nums; color: var(--soft); background: none; border: 0;
  border-right: 1px solid var(--line); padding: .25rem .7rem; cursor: pointer; }
.inspect .choice button:last-child { border-right: 0; }
.inspect .choice button:hover { color: var(--ink); }
.inspect .choice button[aria-pressed=true] { background: var(--ink); color: var(--paper); }
.inspect button:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
.inspect .panes { display: grid; grid-template-columns: minmax(0, 1fr) 23rem; gap: 1.5rem; align-items: start; }
.inspect .text, .inspect .states { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.inspect .text { padding: 1.4rem 1.6rem; font: 1.06rem/2 var(--serif); white-space: pre-wrap; overflow-wrap: anywhere;
  max-height: 44rem; overflow-y: auto; margin: 0; }
.inspect .text span { padding: .18em 0; border-radius: 2px; transition: opacity .12s; cursor: default; }
.inspect .text span:hover { outline: 1.5px solid var(--ink); }
.inspect .focused .text span:not(.on) { opacity: .28; background: none !important; }
.inspect .states { max-height: 44rem; overflow-y: auto; }
.inspect .state { display: block; width: 100%; text-align: left; font: inherit; color: inherit; background: none; border: 0;
  border-bottom: 1px solid var(--line); padding: .6rem 1rem .65rem; cursor: pointer; }
.inspect .state:last-child { border-bottom: 0; }
.inspect .state:hover, .inspect .state[aria-pressed=true] { background: color-mix(in srgb, var(--ink) 5%, transparent); }
.inspect .line { display: flex; align-items: center; gap: .5rem; font-size: .82rem; font-variant-numeric: tabular-nums; }
.inspect .swatch { flex: none; width: .8rem; height: .8rem; border-radius: 3px; }
.inspect .line b { font-weight: 600; min-width: 2rem; }
.inspect .track { flex: 1; height: .3rem; border-radius: 2px; background: var(--line); overflow: hidden; }
.inspect .track i { display: block; height: 100%; border-radius: 2px; }
.inspect .share { min-width: 3rem; text-align: right; }
.inspect .length { color: var(--soft); min-width: 5.6rem; text-align: right; }
.inspect .pieces { margin: .35rem 0 0; display: flex; flex-wrap: wrap; gap: .25rem .3rem; font: .86rem/1.35 var(--serif); }
.inspect .pieces span { border: 1px solid var(--line); border-radius: 4px; padding: .02rem .38rem; white-space: pre;
  max-width: 100%; overflow: hidden; text-overflow: ellipsis; }
.inspect .pieces i { font: .74rem/1.75 var(--sans); color: var(--soft); flex: none; width: 5.1rem; }
.inspect .tip { position: fixed; z-index: 9; pointer-events: none; min-width: 11rem; background: var(--card); color: var(--ink);
  border: 1px solid var(--line); border-radius: 8px; box-shadow: 0 6px 24px #0003; padding: .6rem .75rem;
  font: .8rem/1.5 var(--sans); font-variant-numeric: tabular-nums; }
.inspect .tip strong { font: 600 1rem/1.3 var(--serif); white-space: pre; }
.inspect .tip .line { gap: .4rem; }
.inspect .tip em { display: block; font-style: normal; color: var(--soft); margin-top: .25rem; }
.inspect .tip .track { min-width: 3rem; }
.inspect [hidden] { display: none; }
@media (max-width: 860px) { .inspect .panes { grid-template-columns: minmax(0, 1fr); } .inspect .states { max-height: 26rem; } }
@media print { .inspect .text, .inspect .states { max-height: none; } }
"""

_BODY = """<section class="inspect">
<div class="bar">
<div class="choice"><span>Layer</span><div data-choice="layer"></div></div>
<div class="choice"><span>Head</span><div data-choice="head"></div></div>
<div class="choice"><span>Colour by</span><div data-choice="mode"></div></div>
</div>
<div class="panes"><div class="text"></div><div class="states"></div></div>
<div class="tip" hidden></div>
<script type="application/json">@DATA@</script>
<script>@SCRIPT@</script>
</section>"""

_SCRIPT = """
(() => {
  const root = document.currentScript.closest(".inspect");
  const data = JSON.parse(root.querySelector("script[type='application/json']").textContent);
  const [text, states, tip, panes] = [".text", ".states", ".tip", ".panes"].map((name) => root.querySelector(name));
  const chosen = { layer: data.layers.length >> 1, head: 0, mode: "writes" };
  const signs = { "\\n": "\\u21b5", "\\t": "\\u21e5", " ": "\\u2423", "\\u3000": "\\u25a1" };
  const visible = (s) => s.replace(/[\\n\\t \\u3000]/g, (c) => signs[c]);
  const percent = (x) => (x >= 0.0995 ? (100 * x).toFixed(0) : (100 * x).toFixed(1)) + "%";
  const element = (tag, name, content) => {
    const made = document.createElement(tag);
    if (name) made.className = name;
    if (content !== undefined) made.textContent = content;
    return made;
  };
  let rank = [], focus = null;
  // The golden angle keeps the hues of states of neighbouring rank far apart, however many there are.
  const hue = (state) => (rank[state] * 137.508 + 255) % 360;
  const colour = (state, alpha) => `oklch(var(--state-lightness) var(--state-chroma) ${hue(state)} / ${alpha})`;
  const head = () => data.layers[chosen.layer].heads[chosen.head];

  // The states of a piece: mean weights over the tokens that spell it, strongest first.
  const weights = (use, piece) => {
    const sums = new Map();
    for (let t = piece.start; t < piece.end; t++)
      use.states[t].forEach((s, i) => sums.set(s, (sums.get(s) || 0) + use.weights[t][i] / 1000 / (piece.end - piece.start)));
    return [...sums].sort((a, b) => b[1] - a[1]);
  };
  const row = (state, share, full, length) => {
    const line = element("div", "line");
    const swatch = element("span", "swatch"), track = element("span", "track"), fill = element("i");
    swatch.style.background = fill.style.background = colour(state, 1);
    fill.style.width = Math.min(100, 100 * share / full) + "%";
    track.append(fill);
    line.append(swatch, element("b", "", state), track, length === undefined ? element("span", "share", share.toFixed(3))
      : element("span", "share", percent(share)));
    if (length !== undefined) {
      const tokens = length >= 100 ? Math.round(length).toLocaleString("en") : length;
      line.append(element("span", "length", length === null ? "never updated" : `\\u2248 ${tokens} tokens`));
    }
    return line;
  };
  const setFocus = (state) => {
    focus = state;
    panes.classList.toggle("focused", state !== null);
    for (const span of text.children) {
      const shown = state === null ? span.used[0] : span.used.find((u) => u[0] === state);
      span.classList.toggle("on", state !== null && shown !== undefined && shown[1] > 0.02 * span.full);
      span.style.background = shown ? colour(shown[0], (0.12 + 0.88 * Math.min(1, shown[1] / span.full)).toFixed(2)) : "none";
    }
    for (const card of states.children) card.setAttribute("aria-pressed", card.state === state);
  };
  const draw = () => {
    const current = head(), use = current[chosen.mode];
    rank = [];
    current.states.forEach((s, i) => (rank[s.state] = i));
    const strongest = data.pieces.map((piece) => weights(use, piece));
    const sorted = strongest.map((w) => (w.length ? w[0][1] : 0)).sort((a, b) => a - b);
    const full = Math.max(sorted[Math.floor(0.95 * (sorted.length - 1))], 1e-6);
    text.replaceChildren(...data.pieces.map((piece, i) => {
      const span = element("span", "", piece.text);
      span.used = strongest[i];
      span.piece = piece;
      span.full = full;
      return span;
    }));
    const share = chosen.mode === "writes" ? "write_share" : "read_share";
    const listed = [...current.states].sort((a, b) => b[share] - a[share]);
    states.replaceChildren(...listed.map((s) => {
      const card = element("button", "state");
      card.state = s.state;
      card.append(row(s.state, s[share], listed[0][share], s.memory_length));
      for (const [name, label, weight] of data.lists) {
        if (!s[name].length) continue;
        const list = element("div", "pieces");
        if (label) list.append(element("i", "", label));
        for (const p of s[name]) {
          const chip = element("span", "", visible(p.text));
          chip.title = `${p.count} times in the text, mean ${weight} weight ${p.weight}`;
          list.append(chip);
        }
        card.append(list);
      }
      card.onclick = () => setFocus(focus === s.state ? null : s.state);
      return card;
    }));
    setFocus(null);
  };
  text.onmousemove = (event) => {
    const span = event.target;
    tip.hidden = !span.used;
    if (tip.hidden) return;
    const other = chosen.mode === "writes" ? "reads" : "writes";
    const rows = (used) => used.slice(0, 3).map(([s, w]) => row(s, w, span.full));
    tip.replaceChildren(element("strong", "", visible(span.textContent)),
      element("em", "", chosen.mode), ...rows(span.used),
      element("em", "", other), ...rows(weights(head()[other], span.piece)));
    const box = tip.getBoundingClientRect();
    tip.style.left = Math.max(8, Math.min(event.clientX + 14, innerWidth - box.width - 8)) + "px";
    const below = event.clientY + 18;
    tip.style.top = (below + box.height > innerHeight ? event.clientY - box.height - 12 : below) + "px";
  };
  text.onmouseleave = () => (tip.hidden = true);

  const options = {
    layer: data.layers.map((l, i) => [i, l.layer + 1]),
    head: data.layers[0].heads.map((h) => [h.head, h.head + 1]),
    mode: [["writes", "state written"], ["reads", "state read"]],
  };
  for (const [name, list] of Object.entries(options)) {
    const group = root.querySelector(`[data-choice=${name}]`);
    group.parentElement.hidden = list.length < 2;
    group.append(...list.map(([value, label]) => {
      const button = element("button", "", label);
      const press = () => [...group.children].forEach((b) => b.setAttribute("aria-pressed", b === button));
      button.onclick = () => { chosen[name] = value; press(); draw(); };
      if (chosen[name] === value) queueMicrotask(press);
      return button;
    }));
  }
  draw();
})();
"""


def inspection_fragment(result: InspectionRecord) -> str:
    """The visualization as a fragment of a page whose style includes `pages.STYLE` and `INSPECTION_STYLE`."""
    shown = {
        "pieces": result["pieces"],
        "layers": [_compact(layer) for layer in result["layers"]],
        "lists": LAGGED_LISTS if result.get("update_lag") else LISTS,
    }
    # "<" inside a string could end the script element; \u003c is the same character in JSON.
    data = json.dumps(shown, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return _BODY.replace("@SCRIPT@", _SCRIPT).replace("@DATA@", data)


def _compact(layer: LayerInspection) -> LayerInspection:
    """A layer with token weights in integer thousandths: half the size, and finer than a color can show."""
    heads: list[HeadInspection] = [
        {**head, "writes": _thousandths(head["writes"]), "reads": _thousandths(head["reads"])} for head in layer["heads"]
    ]
    return {**layer, "heads": heads}


def _thousandths(use: TokenStates) -> TokenStates:
    return {"states": use["states"], "weights": [[round(1000 * weight) for weight in weights] for weights in use["weights"]]}


def inspection_html(result: InspectionRecord, title: str = "Memory at work") -> str:
    """The record of `inspect_text` as a self-contained HTML page."""
    heads, layers = len(result["layers"][0]["heads"]), len(result["layers"])
    size = f"{len(result['tokens']):,} tokens, {layers} layers"
    memory = f"{result['num_states']} memory states" + (f" in each of {heads} heads" if heads > 1 else " in each")
    body = f'<h1>{escape(title)}</h1>\n<p class="note">{size}, {memory}. {explanation(result)}</p>\n' + inspection_fragment(
        result
    )
    return page(title, body, INSPECTION_STYLE)


def explanation(result: InspectionRecord | None) -> str:
    """A paragraph that explains the visualization of a record."""
    return LAGGED_EXPLANATION if result and result.get("update_lag") else EXPLANATION


LISTS = [("pieces", "", "update")]
LAGGED_LISTS = [("read_at", "read at", "merge"), ("written_after", "written after", "update"), ("pieces", "holds", "update")]
"""The lists of pieces shown for a state: field of the record, label, and the weight that ranks them."""

EXPLANATION = (
    "Each piece of text has the colour of the memory state it uses most, stronger for more use. Hover over the text to see "
    "the states it writes and reads; click a state to see where it is used. Next to a state: its share of all updates or "
    "reads, the tokens after which it has forgotten all but 1/e of its contents, and the pieces that update it most."
)
LAGGED_EXPLANATION = (
    "Each piece of text has the colour of the memory state it uses most, stronger for more use. A piece is written to the "
    "states that the previous token reads, so that this token finds it when it recurs. Hover over the text to see the "
    "states it writes and reads; click a state to see where it is used. Next to a state: its share of all updates or reads, "
    "the tokens after which it has forgotten all but 1/e of its contents, the pieces that read it, those after which it is "
    "written, and the pieces it holds, which followed those."
)
