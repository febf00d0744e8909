import js from "@eslint/js";

const browser = Object.fromEntries(
  [
    ...["document", "window", "localStorage", "matchMedia", "scrollTo", "innerWidth", "addEventListener"],
    ...["setTimeout", "clearTimeout", "requestAnimationFrame", "performance", "getComputedStyle"],
    ...["IntersectionObserver", "Event", "Blob", "URL", "CSS"],
  ].map((name) => [name, "readonly"]),
);

export default [
  js.configs.recommended,
  {
    rules: {
      eqeqeq: "error",
      "no-var": "error",
      "prefer-const": ["error", { destructuring: "all" }],
      "no-shadow": "error",
      "no-unused-vars": ["error", { args: "all", argsIgnorePattern: "^_" }],
    },
  },
  // The page's scripts are concatenated into one; each adds its functions to LR.
  {
    files: ["hf_lowrank/report/assets/*.js"],
    languageOptions: { sourceType: "script", globals: { ...browser, LR: "readonly" } },
  },
  {
    files: ["tests/report/browser/*.mjs"],
    languageOptions: { globals: { ...browser, LR: "readonly", process: "readonly", console: "readonly" } },
  },
];
