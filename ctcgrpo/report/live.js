// Polls for changes and replaces what changed, in place: the scroll position, open details and the chosen group stay.
const POLL_SECONDS = 2, last = new Map();
let etag = null, live = null, choose = null, offset = 0;
// Calls `draw` where the value differs from that of the last call with this name.
function renew(name, value, draw) {
  const text = JSON.stringify(value);
  if (last.get(name) === text) return;
  last.set(name, text); draw(value);
}
function duration(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 60 ? `${minutes} min` : minutes < 2880 ? `${Math.floor(minutes / 60)} h ${minutes % 60} min` : `${Math.round(minutes / 1440)} days`;
}
function say(text, warn) { renew("state", [text, warn], () => { byId("said").textContent = inOrder(text); byId("state").classList.toggle("warn", warn); }); }
function sayState() {
  const silent = Math.max(0, (Date.now() + offset) / 1000 - live.written), patience = Math.max(180, 4 * (live.seconds ?? 0));
  const ago = `the newest file is ${duration(silent)} old`;
  if (live.finished) say(`Finished. ${live.phase}.`, false);
  else if (silent > patience) say(`${live.phase}; ${ago}: the run may have stopped. The command that started it resumes it.`, true);
  else say(`${live.phase}; ${ago}.`, false);
}
function cards(rows) {
  byId("now").replaceChildren(...rows.map(([name, value, note]) => {
    const one = make("div"); one.append(make("span", {class: "soft"}, name), make("b", {}, value), make("span", {class: "soft"}, note)); return one;
  }));
}
function table(place, names, rows) {
  const box = document.createDocumentFragment(); tableOf(box, names, rows);
  for (const row of box.querySelectorAll("tr")) [...row.children].slice(1).forEach(cell => cell.classList.add("number"));
  byId(place).replaceChildren(box);
}
function progress(found) {
  byId("progress").max = found.max_steps; byId("progress").value = found.done;
  const known = found.seconds !== null;
  cards([["steps", `${found.done} of ${found.max_steps}`, `${Math.round(100 * found.done / found.max_steps)} % done`],
    ["time per step", known ? duration(found.seconds) : "-", known ? "median of the last 10 steps" : "known after the first step"],
    ["time left", found.left === null ? "-" : duration(found.left), found.left === null ? "" : "without validations"],
    ["held-out score", found.score === null ? "-" : signed(found.score, 3), found.score_note]]);
}
function scores(found) {
  const shown = x => x === null ? "-" : signed(x, 3);
  table("scores", ["", "held out: first", "held out: now", "training: first", "training: now"], found.rows.map(([name, ...values]) => [name, ...values.map(shown)]));
  byId("scores-note").textContent = found.note;
}
function failures(found) {
  if (found.rows.length) table("failures", ["reason", "last 10 steps", "all steps"], found.rows);
  else byId("failures").replaceChildren(make("p", {}, "none"));
  byId("failed").hidden = !found.newest.length;
  byId("failed-list").replaceChildren(...found.newest.map(text => make("p", {class: "failure"}, text)));
}
function latest(episodes, key) {
  const group = grouped(episodes).find(g => keyOf(g[0]) === key), turns = (group ?? []).flatMap(e => e[10] ?? []);
  const where = group ? `${group[0][0] === "step" ? "Step" : "Validation after step"} ${group[0][1]}, ${group[0][2]} (${group[0][3]}). ` : "No dialogue yet.";
  byId("latest-where").textContent = inOrder(where) + (group ? turns.length ? "A turn's colour is its advantage." : "Not trained on: without credit." : "");
  showGroup(byId("latest"), group);
}
function draw(data) {
  const f = {...data.figures, live: true};
  live = data.live;
  if (f.words.task !== document.body.dataset.task) { location.reload(); return; }
  byId("live").hidden = byId("more").hidden = false;
  addLooks(f.tags);
  renew("about", [f.credit_options, f.problems, f.shown, f.of, f.steps], () => about(f));
  renew("headline", [f.headline, f.facts], () => headline(f));
  renew("audits", f.audits, () => audits(f.audits, f.words.tag));
  renew("progress", live.progress, progress);
  renew("scores", live.scores, scores);
  renew("failures", live.failures, failures);
  if (byId("tip").style.display !== "block") renew("charts", [f.validations, f.training, f.states, f.credit, f.times, f.failures], () => charts(f));
  latest(data.episodes, JSON.stringify(live.latest));
  if (choose) choose(data.episodes); else choose = browser(data.episodes, f.words);
  sayState();
  document.body.dataset.ready = "yes";
}
async function poll() {
  if (document.hidden && live) return;
  try {
    const answer = await fetch("data", {cache: "no-store", headers: etag ? {"If-None-Match": etag} : {}});
    offset = Date.parse(answer.headers.get("date")) - Date.now() || 0;
    if (answer.status === 304) { if (live) sayState(); return; }
    if (!answer.ok) { say(`The server answered ${answer.status}; trying again.`, true); return; }
    const data = await answer.json();
    etag = answer.headers.get("etag");
    if (data.waiting) say(data.waiting, false); else draw(data);
  } catch (error) {
    if (!(error instanceof TypeError)) throw error;
    say("No connection to ctcgrpo report --live; trying again. The run itself is not affected.", true);
  }
}
(async () => {
  document.addEventListener("visibilitychange", () => { if (!document.hidden) poll(); });
  for (;;) { await poll(); await new Promise(done => setTimeout(done, 1000 * POLL_SECONDS)); }
})();
