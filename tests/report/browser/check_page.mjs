// Opens a report page in headless Chromium, uses every control, and prints what it found as JSON.
//   node check_page.mjs PAGE CHROMIUM [SCREENSHOT_FOLDER]
import { createRequire } from "node:module";
import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const require = createRequire(process.env.BROWSER_MODULES ? pathToFileURL(process.env.BROWSER_MODULES + "/x.js") : import.meta.url);
const { chromium } = require("playwright-core");
const axe = readFileSync(require.resolve("axe-core"), "utf8");
const [, , file, executablePath, shots] = process.argv;

const found = { faults: [], requests: [], axe: [], overflow: [], controls: {} };
const browser = await chromium.launch({
  executablePath,
  args: ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"],
});

async function open(width, colorScheme) {
  const context = await browser.newContext({ viewport: { width, height: 900 }, colorScheme, acceptDownloads: true, bypassCSP: true });
  const page = await context.newPage();
  page.on("pageerror", (error) => found.faults.push(error.message));
  page.on("console", (message) => { if (message.type() === "error") found.faults.push(message.text()); });
  page.on("request", (request) => { if (!/^(file|data|blob):/.test(request.url())) found.requests.push(request.url()); });
  await page.goto(pathToFileURL(file).href);
  await page.waitForSelector("body.ready");
  const height = await page.evaluate(() => document.documentElement.scrollHeight);
  for (let y = 0; y < height; y += 700) {
    await page.evaluate((top) => scrollTo({ top, behavior: "instant" }), y);
    await page.waitForTimeout(40);
  }
  await page.evaluate(() => scrollTo({ top: 0, behavior: "instant" }));
  return page;
}

for (const [width, scheme] of [[1440, "light"], [1440, "dark"], [390, "light"], [390, "dark"], [360, "light"], [1600, "light"]]) {
  const page = await open(width, scheme);
  const wide = await page.evaluate(() => document.documentElement.scrollWidth);
  if (wide > width) found.overflow.push([width, wide]);
  await page.evaluate(axe);
  const { violations } = await page.evaluate(() => window.axe.run(document, { resultTypes: ["violations"] }));
  for (const v of violations) found.axe.push({ width, scheme, id: v.id, impact: v.impact, where: v.nodes.slice(0, 3).map((n) => n.html.slice(0, 160)) });
  if (shots) await page.screenshot({ path: `${shots}/${width}-${scheme}.png`, fullPage: true });
  await page.context().close();
}

const page = await open(1440, "light");
const does = async (name, act) => {
  try { found.controls[name] = await act(); } catch (error) { found.controls[name] = `failed: ${error.message.split("\n")[0]}`; }
};
const column = (id) => page.$$eval(`table.runs tbody td[data-id="${id}"]`, (cells) => cells.filter((c) => c.offsetParent).map((c) => Number(c.dataset.v)));
const rising = (values) => values.every((v, i) => i === 0 || v >= values[i - 1]);

await does("sort", async () => {
  const heading = page.locator('table.runs th[data-id="train_seconds"] button').first();
  await heading.focus();
  await page.keyboard.press("Enter");
  const up = rising(await column("train_seconds"));
  await page.keyboard.press("Space");
  const down = rising((await column("train_seconds")).reverse());
  const said = await page.getAttribute('table.runs th[data-id="train_seconds"]', "aria-sort");
  return up && down && said === "descending";
});
await does("columns", async () => {
  await page.selectOption("select.columns", "spectra");
  const spectra = await page.isVisible('th[data-id="weight_stable_rank"]');
  const rest = await page.isVisible('th[data-id="perplexity"]');
  const run = await page.isVisible('th[data-id="run"]');
  await page.selectOption("select.columns", "training");
  return spectra && run && !rest;
});
/* Only what is in view is drawn at once, so look at it before counting. */
const lines = async () => {
  await page.locator("#fig-loss").evaluate((figure) => figure.scrollIntoView({ behavior: "instant" }));
  await page.waitForTimeout(250);
  return page.$$eval("#fig-loss .line", (all) => all.length);
};
await does("filter", async () => {
  const before = await lines();
  await page.locator("button.chip").first().click();
  const after = await lines();
  const pressed = await page.getAttribute("button.chip >> nth=0", "aria-pressed");
  await page.click("#allmethods");
  return after < before && pressed === "false" && (await lines()) === before;
});
await does("only one", async () => {
  await page.locator("button.chip").nth(1).dblclick();
  const pressed = await page.$$eval("button.chip", (all) => all.filter((c) => c.getAttribute("aria-pressed") === "true").length);
  await page.click("#allmethods");
  return pressed === 1;
});
await does("seeds", async () => {
  if (!(await page.$("input[name=seeds]"))) return true;
  const before = await lines();
  await page.check("input[name=seeds][value=each]", { force: true });
  const after = await lines();
  await page.check("input[name=seeds][value=mean]", { force: true });
  return after > before;
});
await does("loss", async () => {
  const path = () => page.$eval("#fig-loss .line", (line) => line.getAttribute("d"));
  const seen = new Set([await path()]);
  for (const [name, value] of [["which", "train"], ["part", "all"], ["part", "end"], ["which", "eval"]]) {
    await page.check(`#fig-loss input[name=${name}][value=${value}]`, { force: true });
    seen.add(await path());
  }
  return seen.size === 5;
});
await does("checkpoint", async () => {
  const slider = page.locator("#step-random_curve");
  await slider.scrollIntoViewIfNeeded();
  const before = await page.locator("[data-curve] output").first().textContent();
  await slider.focus();
  await page.keyboard.press("ArrowLeft");
  const after = await page.locator("[data-curve] output").first().textContent();
  await page.check('input[name="abs-random_curve"][value=absolute]', { force: true });
  return before !== after;
});
await does("layers", async () => {
  await page.locator("#fig-layers").scrollIntoViewIfNeeded();
  await page.waitForTimeout(200);
  const path = () => page.$eval("#fig-layers .line", (line) => line.getAttribute("d"));
  const before = await path();
  await page.selectOption("#layer-metric", "weight_stable_rank");
  const after = await path();
  await page.locator("#layer-step").focus();
  await page.keyboard.press("Home");
  return before !== after && after !== (await path());
});
await does("compare", async () => {
  await page.locator("#fig-compare").scrollIntoViewIfNeeded();
  await page.selectOption("#compare-by", "peak_memory");
  return (await page.locator("#fig-compare .title").textContent()).includes("MiB");
});
await does("hover", async () => {
  const chart = page.locator("#fig-loss .chart");
  await chart.scrollIntoViewIfNeeded();
  const box = await chart.boundingBox();
  await page.mouse.move(box.x + box.width / 2, box.y + box.height / 2);
  const shown = await page.isVisible(".tip");
  await page.mouse.move(2, 2);
  return shown && !(await page.isVisible(".tip"));
});
await does("keys", async () => {
  await page.locator("#fig-loss .chart").focus();
  await page.keyboard.press("End");
  const said = await page.textContent("#live");
  await page.keyboard.press("ArrowLeft");
  return said.startsWith("step") && said !== (await page.textContent("#live"));
});
await does("values", async () => {
  await page.locator("#fig-loss .tools button").first().click();
  return (await page.locator("#fig-loss .values tbody tr").count()) > 3;
});
await does("csv", async () => {
  const names = [];
  for (const selector of ["button.savetable", "#savealldata", "#fig-loss .tools button >> nth=1", "#fig-layers .tools button", "#fig-compare .tools button"]) {
    const [file_] = await Promise.all([page.waitForEvent("download"), page.locator(selector).first().click()]);
    const text = readFileSync(await file_.path(), "utf8").trim().split("\r\n");
    if (text.length < 3 || text.some((line) => line.split(",").length < 3)) return `short: ${file_.suggestedFilename()}`;
    names.push(file_.suggestedFilename());
  }
  return new Set(names).size === 5;
});
await does("details", async () => {
  await page.locator("details.run summary").first().click();
  return page.locator("details.run pre").first().isVisible();
});
await does("theme", async () => {
  const ground = () => page.evaluate(() => getComputedStyle(document.body).backgroundColor);
  const before = await ground();
  await page.click("#theme");
  return before !== (await ground());
});
await does("print", async () => {
  await page.emulateMedia({ media: "print" });
  const bar = await page.isVisible(".bar");
  await page.emulateMedia({ media: "screen" });
  return !bar;
});
// Time from a click on a filter to the frame that shows it, at five places of the page: the least of several clicks,
// since other work on the machine only adds to it.
found.filter_ms = await page.evaluate(async () => {
  const times = [];
  for (const place of [0, 0.25, 0.5, 0.75, 1]) {
    scrollTo({ top: place * document.documentElement.scrollHeight, behavior: "instant" });
    const here = [];
    for (let i = 0; i < 6; i++) {
      await new Promise((done) => setTimeout(done, 400));
      const began = performance.now();
      document.querySelector("button.chip").click();
      await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
      here.push(performance.now() - began);
    }
    times.push(Math.round(Math.min(...here)));
  }
  return times;
});
console.log(JSON.stringify(found, null, 1));
await browser.close();
