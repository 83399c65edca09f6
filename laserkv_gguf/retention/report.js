"use strict";
// Text goes into the page by textContent only: whatever a document holds stays text.
(() => {
  const STATES = ["anchor", "pool", "window", "evicted"], MARKS = "apwe", EVICTED = 3;
  const CHUNK = 400, LONGEST = 1600, LEVELS = [0.5, 0.65, 0.75, 0.83, 0.89, 0.94, 0.98];
  const KINDS = { uint8: Uint8Array, uint16: Uint16Array, int32: Int32Array, float32: Float32Array };
  const $ = (id) => document.getElementById(id);
  const make = (name, cls, text) => {
    const made = document.createElement(name);
    if (cls) made.className = cls;
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const number = (value) => value.toLocaleString("en-US");

  function decoded(given) {
    if (!given) return null;
    const raw = atob(given.data), bytes = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
    return new KINDS[given.type](bytes.buffer);
  }

  const reports = JSON.parse($("data").textContent).map((one) => ({
    ...one,
    states: decoded(one.states), scores: decoded(one.scores), looked: decoded(one.looked),
    positions: decoded(one.positions), lengths: decoded(one.lengths),
  }));
  $("data").remove();
  const first = reports[0], text = first.text, count = first.lengths.length;
  const offsets = new Uint32Array(count + 1);
  for (let i = 0; i < count; i++) offsets[i + 1] = offsets[i] + first.lengths[i];
  const tokenAt = (offset) => {
    let low = 0, high = count;
    while (low + 1 < high) {
      const middle = (low + high) >> 1;
      if (offsets[middle] <= offset) low = middle; else high = middle;
    }
    return low;
  };

  // blocks: [first token, last token, part, number in the part]
  const blocks = [];
  for (const part of first.parts) {
    const starts = part.blocks.length ? part.blocks : [part.start];
    starts.forEach((start, i) => blocks.push({
      start, end: i + 1 < starts.length ? starts[i + 1] : part.end, part, number: i, of: starts.length,
    }));
  }
  const blockOf = (token) => {
    let low = 0, high = blocks.length;
    while (low + 1 < high) {
      const middle = (low + high) >> 1;
      if (blocks[middle].start <= token) low = middle; else high = middle;
    }
    return blocks[low];
  };

  // a token's shade: how many of those it was chosen among score less
  function levelled(values, spans) {
    const levels = new Uint8Array(count);
    for (const [start, end] of spans) {
      const ranked = values.slice(start, end).filter((value) => value === value && value > -Infinity).sort();
      if (!ranked.length || ranked[0] === ranked[ranked.length - 1]) continue;
      const limits = LEVELS.map((share) => ranked[Math.min(Math.floor(share * ranked.length), ranked.length - 1)]);
      for (let i = start; i < end; i++) {
        let level = 0;
        while (level < 7 && values[i] >= limits[level]) level++;
        levels[i] = level;
      }
    }
    return levels;
  }
  function lookedAt(values) {
    const levels = new Uint8Array(count), shares = values.filter((value) => value > 0).sort();
    if (!shares.length) return levels;
    const limits = LEVELS.map((share) => shares[Math.min(Math.floor(share * shares.length), shares.length - 1)]);
    for (let i = 0; i < count; i++) {
      let level = 0;
      if (values[i] > 0) while (level < 7 && values[i] >= limits[level]) level++;
      levels[i] = level;
    }
    return levels;
  }
  const spans = blocks.map((block) => [block.start, block.end]);
  for (const report of reports) {
    report.byScore = levelled(report.scores, spans);
    report.byLooks = report.looked ? lookedAt(report.looked) : null;
    report.levels = report.byScore;
  }

  // ---- the text, in chunks that are plain until they come near ----
  const main = $("text"), chunks = [], hits = new Uint8Array(count), seen = new Uint8Array(count);
  let here = [-1, -1];

  function cut(start, end) {
    if (end - start <= CHUNK) return end;
    for (let i = start + CHUNK; i < Math.min(end, start + LONGEST); i++) {
      if (text.charCodeAt(offsets[i] - 1) === 10) return i;
    }
    for (let i = start + CHUNK; i < Math.min(end, start + LONGEST); i++) {
      if (text.charCodeAt(offsets[i]) === 32) return i;
    }
    return Math.min(end, start + LONGEST);
  }

  function share(report, start, end) {
    let kept = 0;
    for (let i = start; i < end; i++) kept += report.states[i] !== EVICTED;
    return kept;
  }

  function headed(block) {
    const kept = reports.map((report) => number(share(report, block.start, block.end)));
    const name = block.of > 1 ? `Block ${block.number + 1} of ${block.of}` : "One block";
    const tokens = `tokens ${number(block.start - block.part.start)} to ${number(block.end - block.part.start - 1)}`;
    return `${name} · ${tokens} · kept ${kept.join(" and ")} of ${number(block.end - block.start)}`;
  }

  for (const block of blocks) {
    if (block.number === 0) main.append(make("h2", "", block.part.name));
    block.heading = make("h3", "", headed(block));
    main.append(block.heading);
    for (let start = block.start; start < block.end;) {
      const end = cut(start, block.end), row = make("div", "row"), words = text.slice(offsets[start], offsets[end]);
      const chunk = { start, end, row, sides: [], drawn: false };
      for (const report of reports) {
        const side = make("div", "chunk", words);
        chunk.sides.push(side);
        row.append(side);
      }
      row.chunk = chunk;
      const lines = words.length / (reports.length > 1 ? 60 : 120) + (words.match(/\n/g) || []).length * 0.7;
      row.style.containIntrinsicSize = `auto ${Math.max(1, Math.round(lines)) * 27}px`;
      main.append(row);
      chunks.push(chunk);
      start = end;
    }
  }
  const chunkOf = (token) => {
    let low = 0, high = chunks.length;
    while (low + 1 < high) {
      const middle = (low + high) >> 1;
      if (chunks[middle].start <= token) low = middle; else high = middle;
    }
    return chunks[low];
  };

  function classOf(report, token) {
    let cls = MARKS[report.states[token]];
    if (report.levels[token]) cls += " s" + report.levels[token];
    if (reports.length > 1) {
      const other = report === first ? reports[1] : first;
      if ((report.states[token] === EVICTED) !== (other.states[token] === EVICTED)) cls += " d";
    }
    if (hits[token]) cls += " hit";
    if (token >= here[0] && token < here[1]) cls += " here";
    if (seen[token]) cls += " seen";
    return cls;
  }

  function draw(chunk) {
    chunk.drawn = true;
    chunk.sides.forEach((side, which) => {
      const report = reports[which], drawn = document.createDocumentFragment();
      for (let i = chunk.start; i < chunk.end; i++) {
        if (offsets[i] === offsets[i + 1]) continue;
        const token = make("i", classOf(report, i), text.slice(offsets[i], offsets[i + 1]));
        token.token = i;
        token.report = report;
        drawn.append(token);
      }
      side.replaceChildren(drawn);
    });
  }
  function redraw() {
    for (const chunk of chunks) if (chunk.drawn) draw(chunk);
    paint();
  }
  const near = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting && !entry.target.chunk.drawn) draw(entry.target.chunk);
  }, { rootMargin: "1200px 0px" });
  for (const chunk of chunks) near.observe(chunk.row);
  addEventListener("beforeprint", () => chunks.forEach((chunk) => chunk.drawn || draw(chunk)));

  function go(token, focus) {
    const chunk = chunkOf(token);
    if (!chunk.drawn) draw(chunk);
    const side = main.classList.contains("only-b") ? chunk.sides[1] : chunk.sides[0];
    let target = side.firstChild;
    for (const one of side.children) if (one.token <= token) target = one; else break;
    (target || chunk.row).scrollIntoView({ block: "center" });
    // what lies between may have been laid out only now
    requestAnimationFrame(() => (target || chunk.row).scrollIntoView({ block: "center" }));
    if (focus) main.focus({ preventScroll: true });
  }

  // ---- hover ----
  const tip = $("tip");
  function told(target) {
    const report = target.report, i = target.token, block = blockOf(i);
    const lines = [`token ${number(i - block.part.start)} of ${block.part.name}, block ${block.number + 1}`];
    const at = report.positions[i];
    lines.push(at < 0 ? "evicted" : `kept: ${STATES[report.states[i]]}, position ${number(at)}`);
    const score = report.scores[i];
    lines.push(score === score ? `score ${score.toPrecision(3)}` : "no score: always kept, or the policy gives none");
    if (report.looked) lines.push(`${(report.looked[i] * 100).toPrecision(2)} % of the answer's attention`);
    return lines.join("\n");
  }
  function point(event) {
    const target = event.target;
    if (!target.report) { tip.hidden = true; return; }
    tip.textContent = told(target);
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    tip.style.left = Math.max(4, Math.min(event.clientX + 12, innerWidth - box.width - 8)) + "px";
    const below = event.clientY + 18;
    tip.style.top = (below + box.height > innerHeight ? event.clientY - box.height - 10 : below) + "px";
  }
  main.addEventListener("mousemove", point);
  main.addEventListener("click", point);
  main.addEventListener("mouseleave", () => { tip.hidden = true; });
  addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });

  // ---- blocks as chapters ----
  const chapters = $("chapters");
  chapters.append(new Option("Go to a block", ""));
  blocks.forEach((block, i) => {
    const name = first.parts.length > 1 ? `${block.part.name}: ` : "";
    chapters.append(new Option(name + block.heading.textContent, i));
  });
  chapters.addEventListener("change", () => {
    if (chapters.value === "") return;
    blocks[chapters.value].heading.scrollIntoView();
    requestAnimationFrame(() => blocks[chapters.value].heading.scrollIntoView());
  });

  // ---- search ----
  const lower = text.toLowerCase().length === text.length ? text.toLowerCase() : text;
  let matches = [], current = -1, searched = "";
  function search(step) {
    const wanted = $("search").value, sought = lower === text ? wanted : wanted.toLowerCase();
    if (sought !== searched) {
      searched = sought; matches = []; current = -1; hits.fill(0);
      for (let at = sought ? lower.indexOf(sought) : -1; at >= 0 && matches.length < 20000; at = lower.indexOf(sought, at + sought.length)) {
        const span = [tokenAt(at), tokenAt(at + sought.length - 1) + 1];
        matches.push(span);
        hits.fill(1, span[0], span[1]);
      }
      step = step || 1;
    }
    if (matches.length && step) {
      current = (current + step + matches.length) % matches.length;
      here = matches[current];
    } else if (!matches.length) here = [-1, -1];
    $("found").textContent = wanted ? (matches.length ? `${current + 1} of ${number(matches.length)}` : "not found") : "";
    redraw();
    if (matches.length && step) go(here[0]);
  }
  let typing = 0;
  $("search").addEventListener("input", () => { clearTimeout(typing); typing = setTimeout(search, 200, 0); });
  $("search").addEventListener("keydown", (event) => { if (event.key === "Enter") { clearTimeout(typing); search(event.shiftKey ? -1 : 1); } });
  $("next").addEventListener("click", () => search(1));
  $("previous").addEventListener("click", () => search(-1));

  // ---- what shades, and which side ----
  if (reports.some((report) => report.byLooks)) $("shade").append(new Option("what the answer looked at", "looked"));
  $("shade").addEventListener("change", () => {
    for (const report of reports) report.levels = ($("shade").value === "looked" && report.byLooks) || report.byScore;
    redraw();
  });
  function show(view) {
    main.className = view === "ab" ? "both" : reports.length > 1 ? `only-${view}` : "";
    paint();
  }
  if (reports.length > 1) {
    $("sides").hidden = false;
    $("view").value = innerWidth < 800 ? "a" : "ab";
    $("view").addEventListener("change", () => show($("view").value));
    main.className = $("view").value === "ab" ? "both" : "only-a";
  }

  // ---- the answer's tokens ----
  document.querySelectorAll(".said").forEach((section) => {
    const report = reports[section.dataset.report], into = section.querySelector(".tokens"), list = section.querySelector(".looks");
    if (!into || !report.most.length) return;
    let on = null;
    const tell = (token, i) => {
      seen.fill(0);
      if (on) on.classList.remove("on");
      if (on === token) { on = null; list.hidden = true; redraw(); return; }
      on = token;
      token.classList.add("on");
      const lines = make("ol");
      for (const [at, weight] of report.most[i]) {
        seen[at] = 1;
        const line = make("li"), button = make("button");
        button.type = "button";
        const from = Math.max(0, at - 8), to = Math.min(count, at + 9);
        button.append(make("span", "share", `${(weight * 100).toFixed(1)} %`), text.slice(offsets[from], offsets[at]),
          make("mark", "", text.slice(offsets[at], offsets[at + 1])), text.slice(offsets[at + 1], offsets[to]));
        button.addEventListener("click", () => go(at, true));
        line.append(button);
        lines.append(line);
      }
      list.replaceChildren(`“${report.answer[i]}” looked most at:`, lines);
      list.hidden = false;
      redraw();
    };
    into.replaceChildren(...report.answer.map((piece, i) => {
      const token = make("i", "", piece);
      token.tabIndex = 0;
      token.setAttribute("role", "button");
      token.addEventListener("click", () => tell(token, i));
      token.addEventListener("keydown", (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); tell(token, i); } });
      return token;
    }));
    into.title = "Choose a token to see what it looked at";
  });

  // ---- the map: a bar as long as much was kept, as dark as its scores are high ----
  const map = $("map");
  let drawn = null;
  function paint() {
    const scale = devicePixelRatio || 1, width = map.clientWidth, height = map.clientHeight;
    if (!width) return;
    map.width = width * scale; map.height = height * scale;
    const canvas = map.getContext("2d"), style = getComputedStyle(document.documentElement);
    canvas.scale(scale, scale);
    const colour = (name) => style.getPropertyValue(name).trim();
    const shown = reports.filter((_, i) => reports.length === 1 || main.className === "both" || main.className === "only-" + "ab"[i]);
    const side = (width - 6) / shown.length, step = 2, each = count / (height / step);
    const ink = colour("--ink"), mark = colour("--mark"), found = colour("--hit");
    for (let y = 0, row = 0; y < height; y += step, row++) {
      const from = Math.floor(row * each), to = Math.min(count, Math.max(from + 1, Math.floor((row + 1) * each)));
      if (from >= count) break;
      shown.forEach((report, which) => {
        let kept = 0, level = 0, looks = 0;
        for (let i = from; i < to; i++) {
          if (report.states[i] !== EVICTED) kept++;
          level += report.levels[i];
          looks += seen[i];
        }
        const left = 3 + which * side;
        level = Math.min(7, Math.round(level / (to - from) * 1.6));
        if (level) { canvas.fillStyle = colour("--s" + level); canvas.fillRect(left, y, side - 2, step); }
        canvas.fillStyle = ink;
        canvas.globalAlpha = 0.75;
        canvas.fillRect(left, y, (side - 2) * kept / (to - from), step);
        canvas.globalAlpha = 1;
        if (looks) { canvas.fillStyle = mark; canvas.fillRect(left, y - 1, side - 2, step + 2); }
      });
      for (let i = from; i < to; i++) if (hits[i]) { canvas.fillStyle = found; canvas.fillRect(width - 10, y, 10, step); break; }
    }
    drawn = canvas.getImageData(0, 0, map.width, map.height);
    frame();
  }
  // what is in view, over the map as it was drawn: all that scrolling changes
  function frame() {
    if (!drawn) return;
    const canvas = map.getContext("2d"), height = map.clientHeight, [top, bottom] = visible();
    canvas.putImageData(drawn, 0, 0);
    canvas.strokeStyle = getComputedStyle(document.documentElement).getPropertyValue("--mark").trim();
    canvas.lineWidth = 2;
    canvas.strokeRect(1, top / count * height, map.clientWidth - 2, Math.max(6, (bottom - top) / count * height));
  }
  function visible() {
    const from = main.getBoundingClientRect();
    if (from.top > innerHeight) return [0, 0];
    let low = 0, high = chunks.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (chunks[middle].row.getBoundingClientRect().bottom < 0) low = middle + 1; else high = middle;
    }
    let last = low;
    while (last + 1 < chunks.length && chunks[last + 1].row.getBoundingClientRect().top < innerHeight) last++;
    const box = chunks[low].row.getBoundingClientRect(), end = chunks[last].row.getBoundingClientRect();
    const part = (chunk, box, y) => chunk.start + (chunk.end - chunk.start) * Math.max(0, Math.min(1, (y - box.top) / (box.height || 1)));
    return [part(chunks[low], box, 0), part(chunks[last], end, innerHeight)];
  }
  let waiting = false;
  const later = () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; frame(); });
  };
  addEventListener("scroll", later, { passive: true });
  addEventListener("resize", () => requestAnimationFrame(paint));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => requestAnimationFrame(paint));
  const jump = (event) => {
    const share = (event.clientY - map.getBoundingClientRect().top) / map.clientHeight;
    go(Math.max(0, Math.min(count - 1, Math.floor(share * count))));
  };
  map.addEventListener("pointerdown", (event) => { map.setPointerCapture(event.pointerId); jump(event); });
  map.addEventListener("pointermove", (event) => { if (event.buttons) jump(event); });
  paint();
  document.documentElement.dataset.ready = "yes";
})();
