// Opens a report page in headless Chromium, uses every control, and prints what it found as JSON.
//   node check_page.mjs PAGE CHROMIUM [SCREENSHOT_FOLDER]
import { createRequire } from "node:module";
import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const require = createRequire(
  process.env.BROWSER_MODULES ? pathToFileURL(process.env.BROWSER_MODULES + "/x.js") : import.meta.url,
);
const { chromium } = require("playwright-core");
const axe = readFileSync(require.resolve("axe-core"), "utf8");
const [, , file, executablePath, shots] = process.argv;

const found = { faults: [], requests: [], axe: [], overflow: [], controls: {} };
const browser = await chromium.launch({
  executablePath,
  args: [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
  ],
});

async function open(width, colorScheme) {
  const context = await browser.newContext({
    viewport: { width, height: 900 },
    colorScheme,
    acceptDownloads: true,
    bypassCSP: true,
  });
  const page = await context.newPage();
  page.on("pageerror", (error) => found.faults.push(error.message));
  page.on("console", (message) => {
    if (message.type() === "error") found.faults.push(message.text());
  });
  page.on("request", (request) => {
    if (!/^(file|data|blob):/.test(request.url())) found.requests.push(request.url());
  });
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

for (const [width, scheme] of [
  [1440, "light"],
  [1440, "dark"],
  [768, "light"],
  [768, "dark"],
  [390, "light"],
  [390, "dark"],
]) {
  const page = await open(width, scheme);
  const wide = await page.evaluate(() => document.documentElement.scrollWidth);
  if (wide > width) found.overflow.push([width, wide]);
  // What is far from the window is not painted, and axe would pass over it.
  await page.addStyleTag({ content: "*{content-visibility:visible!important}" });
  await page.evaluate(() => LR.redraw(true));
  await page.waitForTimeout(300);
  await page.evaluate(axe);
  const { violations } = await page.evaluate(() => window.axe.run(document, { resultTypes: ["violations"] }));
  for (const v of violations)
    found.axe.push({
      width,
      scheme,
      id: v.id,
      impact: v.impact,
      where: v.nodes.slice(0, 3).map((n) => n.html.slice(0, 160)),
    });
  if (shots) await page.screenshot({ path: `${shots}/${width}-${scheme}.png`, fullPage: true });
  await page.context().close();
}

/* Without its script the page still answers: the table of methods and the claims are in the HTML. */
{
  const context = await browser.newContext({ viewport: { width: 1440, height: 900 }, javaScriptEnabled: false });
  const bare = await context.newPage();
  await bare.goto(pathToFileURL(file).href);
  const value = bare.locator('table.methods td[data-id="perplexity"] .value').first();
  found.without_script =
    (await bare.isVisible("h1")) && (await value.isVisible()) && (await bare.isVisible("noscript"));
  if (shots) await bare.screenshot({ path: `${shots}/without-script.png` });
  await context.close();
}

const page = await open(1440, "light");
const does = async (name, act) => {
  try {
    found.controls[name] = await act();
  } catch (error) {
    found.controls[name] = `failed: ${error.message.split("\n")[0]}`;
  }
};
const column = (id) =>
  page.$$eval(`table.runs tbody td[data-id="${id}"]`, (cells) =>
    cells.filter((c) => c.offsetParent).map((c) => Number(c.dataset.v)),
  );
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
await does("methods", async () => {
  const heading = page.locator('table.methods th[data-id="speed"] button').first();
  await heading.focus();
  await page.keyboard.press("Enter");
  const values = await page.$$eval('table.methods td[data-id="speed"]', (cells) =>
    cells.filter((c) => c.offsetParent && c.dataset.v).map((c) => Number(c.dataset.v)),
  );
  const said = await page.getAttribute('table.methods th[data-id="speed"]', "aria-sort");
  await page.locator('table.methods th[data-id="perplexity"] button').first().click();
  return values.length > 1 && rising(values) && said === "ascending";
});
await does("against full-rank", async () => {
  const cell = page.locator('table.methods td[data-id="perplexity"] span.beside').first();
  const before = await cell.isVisible();
  await page.check("input[name=against-0][value=beside]", { force: true });
  const after = await cell.isVisible();
  await page.check("input[name=against-0][value=values]", { force: true });
  return !before && after;
});
await does("by metric", async () => {
  const shown = () => page.$$eval("#pictures figure", (all) => all.filter((f) => f.offsetParent !== null).length);
  const all = await shown();
  await page.selectOption("#metric", "d:spectra");
  const spectra = await shown();
  await page.selectOption("#metric", "m:weight_stable_rank");
  const one = await shown();
  const alone =
    (await page.isVisible('table.runs th[data-id="weight_stable_rank"]')) &&
    !(await page.isVisible('table.runs th[data-id="perplexity"]'));
  const compared = await page.inputValue("#compare-by");
  await page.selectOption("#metric", "");
  await page.selectOption("#compare-by", "validation_loss");
  return (
    all > spectra && spectra > one && one > 0 && alone && compared === "weight_stable_rank" && (await shown()) === all
  );
});
await does("by scale", async () => {
  if (!(await page.$("#group"))) return true;
  const first = await page.locator("h1:visible").first().textContent();
  await page.selectOption("#group", "1");
  const second = await page.locator("h1:visible").first().textContent();
  await page.selectOption("#group", "0");
  return first !== second;
});
await does("columns", async () => {
  await page.selectOption("select.columns", "spectra");
  const spectra = await page.isVisible('table.runs th[data-id="weight_stable_rank"]');
  const rest = await page.isVisible('table.runs th[data-id="perplexity"]');
  const run = await page.isVisible('table.runs th[data-id="run"]');
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
  const pressed = await page.$$eval(
    "button.chip",
    (all) => all.filter((c) => c.getAttribute("aria-pressed") === "true").length,
  );
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
  for (const [name, value] of [
    ["which", "train"],
    ["part", "all"],
    ["part", "end"],
    ["which", "eval"],
  ]) {
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
  await page.selectOption("#layer-metric", "weight_spectral_gap");
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
  for (const selector of [
    "button.savemethods",
    "button.savetable",
    "#savealldata",
    "#fig-loss .tools button >> nth=1",
    "#fig-layers .tools button",
    "#fig-compare .tools button",
  ]) {
    const [file_] = await Promise.all([page.waitForEvent("download"), page.locator(selector).first().click()]);
    const text = readFileSync(await file_.path(), "utf8")
      .trim()
      .split("\r\n");
    if (text.length < 3 || text.some((line) => line.split(",").length < 3))
      return `short: ${file_.suggestedFilename()}`;
    names.push(file_.suggestedFilename());
  }
  return new Set(names).size === 6;
});
await does("scatter", async () => {
  const chart = page.locator("#fig-scatter .chart");
  await chart.scrollIntoViewIfNeeded();
  await page.waitForTimeout(250);
  const path = () => page.$eval("#fig-scatter .dots", (dots) => dots.getAttribute("d"));
  const before = await path();
  await chart.focus();
  await page.keyboard.press("Home");
  const said = await page.textContent("#live");
  const tip = await page.isVisible(".tip");
  await page.keyboard.press("Escape");
  await page.selectOption("#scatter-by", { index: 1 });
  return said.includes("validation loss") && tip && before !== (await path());
});
await does("tasks", async () => {
  const chart = page.locator("#fig-tasks .chart").first();
  await chart.scrollIntoViewIfNeeded();
  await page.waitForTimeout(250);
  const box = await chart.boundingBox();
  await page.mouse.move(box.x + box.width / 2, box.y + 30);
  const tip = await page.isVisible(".tip");
  await page.mouse.move(2, 2);
  return tip && (await page.locator("#fig-tasks .ref").count()) > 0;
});
await does("study", async () => {
  if (!(await page.$("#claims"))) return true;
  await page.locator(".claim summary").first().click();
  const parts = await page.locator(".claim table.plain").first().isVisible();
  for (const id of ["figure.prediction", "#fig-sweep"]) {
    await page.locator(id).first().scrollIntoViewIfNeeded();
    await page.waitForTimeout(250);
  }
  const marks = await page.locator("figure.prediction .dots").count();
  const rings = await page.locator("#fig-sweep circle").count();
  await page.locator("#fig-sweep .chart").focus();
  await page.keyboard.press("End");
  const said = await page.textContent("#live");
  const files = [];
  for (const selector of [
    "#saveclaims",
    "figure.prediction .tools button",
    "#fig-sweep .tools button >> nth=1",
    "#fig-tasks .tools button",
  ]) {
    const [file_] = await Promise.all([page.waitForEvent("download"), page.locator(selector).first().click()]);
    files.push(
      readFileSync(await file_.path(), "utf8")
        .trim()
        .split("\r\n").length,
    );
  }
  return parts && marks > 1 && rings > 1 && said.startsWith("learning rate") && files.every((count) => count > 3);
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
  const answer = await page.locator("table.methods .value").first().isVisible();
  const wide = await page.evaluate(() => document.documentElement.scrollWidth <= innerWidth);
  if (shots) await page.screenshot({ path: `${shots}/print.png`, fullPage: true });
  if (shots) await page.pdf({ path: `${shots}/print.pdf`, preferCSSPageSize: true });
  await page.emulateMedia({ media: "screen" });
  return !bar && answer && wide;
});
// Time from a click on a filter to the end of the frame that shows it, at eleven positions of the page: the median of
// seven clicks, and the least, since other work on the machine only adds to it.
found.filter_ms = await page.evaluate(async () => {
  const medians = [],
    least = [];
  for (let place = 0; place <= 10; place++) {
    scrollTo({ top: (place / 10) * document.documentElement.scrollHeight, behavior: "instant" });
    const here = [];
    for (let i = 0; i < 7; i++) {
      await new Promise((done) => setTimeout(done, 250));
      const began = performance.now();
      document.querySelector("button.chip").click();
      await new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
      here.push(performance.now() - began);
    }
    here.sort((a, b) => a - b);
    medians.push(Math.round(here[3]));
    least.push(Math.round(here[0]));
  }
  return { median: medians, least };
});
console.log(JSON.stringify(found, null, 1));
await browser.close();
