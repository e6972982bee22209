"use strict";
// Draws the heat map, shades the text by one layer, and describes single tokens. All decodeVarints come from #data, all text
// from the page itself, which is only copied as text, never parsed.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const box = document.getElementById("text");
  const blocks = [...box.querySelectorAll(".block")];
  const starts = blocks.map((block) => Number(block.dataset.at));
  const lengths = decodeVarints(data.lengths);
  const kinds = expandRuns(data.kinds, data.tokens);
  const layers = data.layers.map((layer) => ({ ...layer, counts: expandRuns(layer.held, data.seen) }));
  const measured = layers.filter((layer) => layer.measured);
  const numHeads = measured.reduce((sum, layer) => sum + layer.heads, 0);
  const total = new Uint32Array(data.seen);
  for (const layer of measured) layer.counts.forEach((count, at) => { total[at] += count; });
  const integers = new Intl.NumberFormat("en");

  // -- decoding ----------------------------------------------------------------------------------------------

  function decodeVarints(text) {
    const coded = atob(text), found = [];
    let value = 0, scale = 1;
    for (let at = 0; at < coded.length; at++) {
      const byte = coded.charCodeAt(at);
      value += (byte & 127) * scale;
      scale *= 128;
      if (byte < 128) { found.push(value); value = 0; scale = 1; }
    }
    return found;
  }

  function expandRuns(text, size) {
    const runs = decodeVarints(text), values = new Uint16Array(size);
    for (let run = 0, at = 0; run < runs.length; at += runs[run], run += 2) values.fill(runs[run + 1], at, at + runs[run]);
    return values;
  }

  // -- shades -------------------------------------------------------------------------------------------------------

  const between = data.levels - 1;

  function level(share) {
    if (share <= 0) return 0;
    return share >= 1 ? data.levels : 1 + Math.min(Math.floor(share * between), between - 1);
  }

  function style(at, counts, heads) {
    if (kinds[at] === 1) return "m";
    return at >= data.seen || kinds[at] === 2 ? "p" : "s" + level(counts[at] / heads);
  }

  // Shade all the text by `counts` of `heads`.
  function shade(counts, heads) {
    blocks.forEach((block, index) => {
      const text = block.textContent, end = index + 1 < starts.length ? starts[index + 1] : data.tokens;
      const fragment = document.createDocumentFragment();
      let from = 0, to = 0, currentStyle = null;
      const close = () => {
        if (to === from) return;
        const part = document.createTextNode(text.slice(from, to));
        if (currentStyle === "s0") { fragment.append(part); } else {
          const span = document.createElement("span");
          span.className = currentStyle;
          span.append(part);
          fragment.append(span);
        }
        from = to;
      };
      for (let at = starts[index]; at < end; at++) {
        const next = style(at, counts, heads);
        if (next !== currentStyle) { close(); currentStyle = next; }
        to += lengths[at];
      }
      close();
      block.replaceChildren(fragment);
    });
  }

  document.getElementById("layer").addEventListener("change", (event) => {
    const layer = layers[event.target.value];
    const [counts, heads] = layer ? [layer.counts, layer.heads] : [total, numHeads];
    shade(counts, heads);
    const tokens = new Array(data.levels + 1).fill(0);
    counts.forEach((count) => { tokens[level(count / heads)]++; });
    document.querySelectorAll(".legend small").forEach((small, step) => { small.textContent = integers.format(tokens[step]); });
    if (chosen) mark(chosen[0], chosen[1]);
  });

  // -- positions of tokens --------------------------------------------------------------------------------------------

  function blockOf(at) {
    let low = 0, high = starts.length - 1;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (starts[middle] <= at) low = middle; else high = middle - 1;
    }
    return low;
  }

  function length(from, to) {
    let sum = 0;
    for (let at = from; at < to; at++) sum += lengths[at];
    return sum;
  }

  // Return the text node and offset of a character of a block.
  function place(block, offset, ending) {
    const walker = document.createTreeWalker(block, NodeFilter.SHOW_TEXT);
    let node = walker.nextNode(), last = node;
    while (node && (ending ? offset > node.length : offset >= node.length)) {
      offset -= node.length;
      last = node;
      node = walker.nextNode();
    }
    return node ? [node, offset] : [last, last ? last.length : 0];
  }

  function rangeOf(from, to) {
    const index = blockOf(from), block = blocks[index], range = document.createRange();
    const end = Math.min(to, index + 1 < starts.length ? starts[index + 1] : data.tokens);
    const offset = length(starts[index], from);
    if (!block.textContent) return null;
    range.setStart(...place(block, offset, false));
    range.setEnd(...place(block, offset + length(from, end), true));
    return range;
  }

  function tokenAt(x, y) {
    let node, offset;
    if (document.caretPositionFromPoint) {
      const caret = document.caretPositionFromPoint(x, y);
      if (caret) { node = caret.offsetNode; offset = caret.offset; }
    } else if (document.caretRangeFromPoint) {
      const caret = document.caretRangeFromPoint(x, y);
      if (caret) { node = caret.startContainer; offset = caret.startOffset; }
    }
    const block = node && node.nodeType === Node.TEXT_NODE && node.parentElement.closest(".block");
    if (!block) return null;
    const walker = document.createTreeWalker(block, NodeFilter.SHOW_TEXT);
    for (let each = walker.nextNode(); each && each !== node; each = walker.nextNode()) offset += each.length;
    let at = Number(block.dataset.at);
    while (at + 1 < data.tokens && offset >= lengths[at]) offset -= lengths[at++];
    // A caret stands between two characters: the pointer may be on the one before.
    for (let back = 0; at > 0 && back < 3 && !within(at, x, y); back++) at--;
    return within(at, x, y) ? at : null;
  }

  function within(at, x, y) {
    const range = lengths[at] ? rangeOf(at, at + 1) : null;
    const hit = (rect) => x >= rect.left && x <= rect.right && y >= rect.top - 4 && y <= rect.bottom + 4;
    return range !== null && [...range.getClientRects()].some(hit);
  }

  // -- the chosen token -----------------------------------------------------------------------------------------------

  const note = document.getElementById("token-note"), strip = document.getElementById("token-layers");
  let chosen = null;
  const cells = layers.map((layer) => {
    const cell = document.createElement("span");
    if (layer.window) cell.classList.add("window");
    cell.textContent = layers.length <= 40 ? layer.index : "";
    strip.append(cell);
    return cell;
  });

  function mark(from, to) {
    for (const old of box.querySelectorAll(".mark")) old.remove();
    const range = rangeOf(from, to), frame = box.getBoundingClientRect(), lines = [];
    for (const rect of range ? range.getClientRects() : []) {
      const line = lines[lines.length - 1];
      if (!rect.width) continue;
      if (line && Math.abs(line.top - rect.top) < rect.height / 2 && rect.left - line.right < 2) {
        line.right = Math.max(line.right, rect.right);
      } else {
        lines.push({ left: rect.left, top: rect.top, right: rect.right, height: rect.height });
      }
    }
    for (const line of lines) {
      const outline = document.createElement("div");
      outline.className = "mark";
      outline.style.left = line.left - frame.left - box.clientLeft + box.scrollLeft + "px";
      outline.style.top = line.top - frame.top - box.clientTop + box.scrollTop + "px";
      outline.style.width = line.right - line.left + "px";
      outline.style.height = line.height + "px";
      box.append(outline);
    }
  }

  function percent(share) {
    if (share > 0 && share < 0.01) return "< 1%";
    return share > 0.99 && share < 1 ? "> 99%" : Math.round(share * 100) + "%";
  }

  // Choose the tokens from `from` to before `to`, and show which heads hold them.
  function chooseTokens(from, to) {
    chosen = [from, to];
    mark(from, to);
    const end = Math.min(to, data.seen);
    const shares = layers.map((layer) => (from < end ? mean(layer.counts, from, end, layer.heads) : 0));
    layers.forEach((layer, index) => {
      cells[index].className = "s" + level(shares[index]) + (layer.window ? " window" : "");
      cells[index].title = `layer ${layer.index}: ${percent(shares[index])} of ${layer.heads} heads`;
    });
    if (to - from > 1) {
      const share = percent(from < end ? mean(total, from, end, numHeads) : 0);
      note.textContent = `Tokens ${integers.format(from)} to ${integers.format(to - 1)}: held by ${share} of ${numHeads} heads, mean.`;
    } else {
      note.replaceChildren(...describeToken(from));
    }
  }

  function describeToken(at) {
    const range = rangeOf(at, at + 1), quote = document.createElement("q");
    quote.textContent = (lengths[at] && range ? range.toString() : "").replaceAll("\n", "⏎") || "part of a character";
    const start = [`Token ${integers.format(at)} `, quote];
    if (at >= data.seen) return [...start, " was generated last and is not in the cache yet."];
    if (!total[at]) return [...start, ": held by no head."];
    const where = measured.filter((layer) => layer.counts[at]).map((layer) => layer.index);
    const layerList = where.length === measured.length ? "in every layer" : "in layers " + where.join(", ");
    return [...start, `: held by ${total[at]} of ${numHeads} heads (${percent(total[at] / numHeads)}), ${layerList}.`];
  }

  function show(from, to) {
    blocks[blockOf(from)].scrollIntoView({ block: "nearest" });
    const rect = rangeOf(from, to)?.getBoundingClientRect();
    if (rect) box.scrollTop += rect.top - box.getBoundingClientRect().top - box.clientHeight / 3;
    chooseTokens(from, to);
  }

  let waiting = false;
  box.addEventListener("mousemove", (event) => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      const at = tokenAt(event.clientX, event.clientY);
      if (at !== null && !(chosen && chosen[0] === at && chosen[1] === at + 1)) chooseTokens(at, at + 1);
    });
  });
  box.addEventListener("click", (event) => {
    const at = tokenAt(event.clientX, event.clientY);
    if (at !== null) chooseTokens(at, at + 1);
  });
  box.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    let at = chosen ? chosen[0] + step : 0;
    while (at > 0 && at < data.tokens - 1 && !lengths[at]) at += step;
    at = Math.max(0, Math.min(data.tokens - 1, at));
    chooseTokens(at, at + 1);
    const rect = rangeOf(at, at + 1)?.getBoundingClientRect(), frame = box.getBoundingClientRect();
    if (rect && (rect.top < frame.top || rect.bottom > frame.bottom)) show(at, at + 1);
  });
  for (const button of document.querySelectorAll("button[data-from]")) {
    button.addEventListener("click", () => {
      document.getElementById("text-title").scrollIntoView({ block: "start" });
      show(Number(button.dataset.from), Number(button.dataset.to));
    });
  }

  // -- the heat map ---------------------------------------------------------------------------------------------------

  const canvas = document.getElementById("map"), mapNote = document.getElementById("map-note");
  const CURVE = 56, AXIS = 18, GAP = 8, LEFT = 30;
  const rows = [...measured, ...layers.filter((layer) => !layer.measured)];
  const merged = measured.flatMap((layer) => layer.merged);
  const MERGED_HEIGHT = merged.length ? 40 : 0;
  const height = Math.max(5, Math.min(14, Math.floor(420 / rows.length)));
  let cursor = null; // [column, row] that the arrow keys have chosen

  function columns() { return Math.max(1, Math.min(data.seen, Math.floor(canvas.clientWidth) - LEFT)); }

  function span(column, count) {
    const from = Math.floor(column * data.seen / count);
    return [from, Math.max(from + 1, Math.floor((column + 1) * data.seen / count))];
  }

  function mean(counts, from, to, heads) {
    let sum = 0;
    for (let at = from; at < to; at++) sum += counts[at];
    return sum / (to - from) / heads;
  }

  function top(row) { return CURVE + GAP + MERGED_HEIGHT + row * height + (row >= measured.length ? GAP : 0); }

  function draw() {
    const width = Math.floor(canvas.clientWidth), bottom = top(rows.length), ratio = window.devicePixelRatio || 1;
    if (width <= LEFT) return;
    canvas.style.height = bottom + AXIS + "px";
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round((bottom + AXIS) * ratio);
    const colours = getComputedStyle(document.documentElement), context = canvas.getContext("2d");
    const colour = (name) => colours.getPropertyValue(name).trim();
    const scale = Array.from({ length: data.levels + 1 }, (_, step) => rgb(colour("--c" + step)));
    context.scale(ratio, ratio);
    context.font = "11px system-ui, sans-serif";
    const count = columns(), step = (width - LEFT) / count;
    const snapped = (column) => Math.round((LEFT + column * step) * ratio) / ratio; // no seams between columns
    for (let column = 0; column < count; column++) {
      const [from, to] = span(column, count), x = snapped(column), wide = snapped(column + 1) - x;
      const share = mean(total, from, to, numHeads);
      context.fillStyle = colour("--c6");
      context.fillRect(x, CURVE - share * (CURVE - 2), wide, share * (CURVE - 2));
      rows.forEach((layer, row) => {
        context.fillStyle = blend(scale, mean(layer.counts, from, to, layer.heads));
        context.fillRect(x, top(row), wide, height - (height > 6 ? 1 : 0));
      });
    }
    context.fillStyle = colour("--soft");
    context.strokeStyle = colour("--line");
    for (const [name, y] of [["100%", 0], ["0", CURVE]]) {
      context.fillText(name, 0, y === 0 ? 9 : y);
      context.beginPath(); context.moveTo(LEFT, y + 0.5); context.lineTo(width, y + 0.5); context.stroke();
    }
    drawMergedSlots(context, colour, width);
    const every = Math.ceil(12 / height);
    rows.forEach((layer, row) => { if (row % every === 0) context.fillText(layer.index + (layer.measured ? "" : "w"), 0, top(row) + Math.min(height, 10)); });
    for (let tick = 0; tick <= 4; tick++) {
      const x = LEFT + tick * (width - LEFT) / 4;
      context.textAlign = ["left", "center", "center", "center", "right"][tick];
      context.fillText(integers.format(Math.round(tick * data.seen / 4)), x, bottom + 14);
    }
    if (cursor) {
      context.strokeStyle = colour("--focus");
      context.lineWidth = 2;
      context.strokeRect(LEFT + cursor[0] * step - 3, top(cursor[1]) - 1, Math.max(step, 1) + 6, height + 1);
    }
  }

  // The first position of each merged slot, as high as the logarithm of its number of tokens.
  function drawMergedSlots(context, colour, width) {
    if (!MERGED_HEIGHT) return;
    const largest = Math.log(Math.max(...merged.map((slot) => slot[1]))), base = CURVE + MERGED_HEIGHT;
    context.fillText("mrg", 0, base);
    context.fillStyle = colour("--focus");
    for (const [position, tokens] of merged) {
      const high = 3 + (MERGED_HEIGHT - 12) * Math.log(tokens) / largest;
      context.fillRect(LEFT + position * (width - LEFT) / data.seen, base - high, 2, high);
    }
    context.fillStyle = colour("--soft");
  }

  function rgb(hex) {
    const full = hex.length === 4 ? [...hex.slice(1)].map((digit) => digit + digit).join("") : hex.slice(1);
    return [0, 2, 4].map((at) => parseInt(full.slice(at, at + 2), 16));
  }

  function blend(scale, share) {
    const at = Math.min(share, 1) * (scale.length - 1), low = Math.min(Math.floor(at), scale.length - 2);
    return `rgb(${scale[low].map((value, part) => Math.round(value + (scale[low + 1][part] - value) * (at - low))).join()})`;
  }

  function describeCell(column, row) {
    const [from, to] = span(column, columns()), layer = rows[row];
    const share = percent(mean(layer.counts, from, to, layer.heads));
    const which = to - from > 1 ? `tokens ${integers.format(from)} to ${integers.format(to - 1)}` : `token ${integers.format(from)}`;
    const range = rangeOf(from, Math.min(to, from + 12));
    const kind = layer.window ? ` (window of ${integers.format(layer.window)})` : "";
    mapNote.textContent = `Layer ${layer.index}${kind}, ${which}: held by ${share} of its heads. “${range ? range.toString().replace(/\s+/g, " ").trim().slice(0, 90) : ""} …”`;
    return from;
  }

  function cellAt(event) {
    const frame = canvas.getBoundingClientRect(), count = columns();
    const column = Math.floor((event.clientX - frame.left - LEFT) / (frame.width - LEFT) * count);
    let row = rows.length - 1;
    while (row > 0 && event.clientY - frame.top < top(row)) row--;
    return [Math.max(0, Math.min(count - 1, column)), row];
  }

  canvas.addEventListener("mousemove", (event) => describeCell(...cellAt(event)));
  canvas.addEventListener("click", (event) => {
    cursor = cellAt(event);
    draw();
    const from = describeCell(...cursor);
    show(from, from + 1);
  });
  canvas.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1], Enter: [0, 0] }[event.key];
    if (!move) return;
    event.preventDefault();
    const far = event.shiftKey ? 20 : 1, [column, row] = cursor || [0, 0];
    cursor = [
      Math.max(0, Math.min(columns() - 1, column + far * move[0])), Math.max(0, Math.min(rows.length - 1, row + move[1])),
    ];
    draw();
    const from = describeCell(...cursor);
    if (event.key === "Enter") show(from, from + 1);
  });

  document.documentElement.classList.add("live");
  draw();
  new ResizeObserver(() => { draw(); if (chosen) mark(chosen[0], chosen[1]); }).observe(canvas);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
})();
