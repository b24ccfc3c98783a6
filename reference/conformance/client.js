// A client of the kit in 30 lines: dpo/plain over JSON lines. In the folder of reference/, run
//   python -m reference.conformance --command "node reference/conformance/client.js"
const NAMES = ["policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected"];
const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
const softplus = (x) => Math.max(x, 0) + Math.log1p(Math.exp(-Math.abs(x))); // does not overflow

function dpo({ beta }, inputs) {
  const logps = NAMES.map((name) => inputs[`${name}_logps`].map(Number)); // "Infinity" is a string
  const [pc, pr, rc, rr] = logps;
  if (logps.some((a) => a.length !== pc.length)) throw new Error("arrays of different lengths");
  const margins = pc.map((_, b) => pc[b] - rc[b] - (pr[b] - rr[b]));
  const losses = margins.map((h) => softplus(-beta * h));
  const slopes = margins.map((h) => -beta / (1 + Math.exp(beta * h)) / margins.length);
  const grads = [slopes, slopes.map((slope) => -slope), slopes.map(() => 0), slopes.map(() => 0)];
  const metrics = { "rewards/chosen": beta * mean(pc.map((_, b) => pc[b] - rc[b])) };
  metrics["rewards/rejected"] = beta * mean(pr.map((_, b) => pr[b] - rr[b]));
  metrics["rewards/margins"] = beta * mean(margins);
  metrics["rewards/accuracies"] = mean(margins.map((h) => (h > 0 ? 1 : 0)));
  const named = Object.fromEntries(NAMES.map((name, i) => [`${name}_logps`, grads[i]]));
  return { loss: mean(losses), per_example: losses, grads: named, metrics };
}

const text = (_, item) => (typeof item === "number" && !isFinite(item) ? String(item) : item);
require("readline").createInterface({ input: process.stdin }).on("line", (line) => {
  const { id, method, objective, dialect, params, inputs } = JSON.parse(line), answer = { id };
  const known = `${objective}/${dialect}` === "dpo/plain";
  try { answer.result = method === "supports" ? known : dpo(params, inputs); }
  catch (error) { answer.error = error.message; }
  console.log(JSON.stringify(answer, text)); // JSON has no Infinity
});
