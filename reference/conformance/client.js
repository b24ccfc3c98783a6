// A small client of the kit: dpo/plain over JSON lines. From the folder that holds reference/:
//   python -m reference.conformance --only dpo/plain \
//     --command "node reference/conformance/client.js"
const NAMES = [
  "policy_chosen_logps", "policy_rejected_logps", "ref_chosen_logps", "ref_rejected_logps",
];
const softplus = (x) => Math.max(x, 0) + Math.log1p(Math.exp(-Math.abs(x))); // does not overflow
const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;

function dpo({ beta }, inputs) {
  // "Infinity" comes as a string, of which Number makes a number.
  const [pc, pr, rc, rr] = NAMES.map((name) => inputs[name].map(Number));
  if ([pr, rc, rr].some((array) => array.length !== pc.length))
    throw new Error("arrays of different lengths");
  const margins = pc.map((_, b) => pc[b] - rc[b] - (pr[b] - rr[b]));
  const losses = margins.map((h) => softplus(-beta * h));
  const slopes = margins.map((h) => -beta / (1 + Math.exp(beta * h)) / margins.length);
  const grads = [slopes, slopes.map((slope) => -slope), slopes.map(() => 0), slopes.map(() => 0)];
  const metrics = {
    "rewards/chosen": beta * mean(pc.map((_, b) => pc[b] - rc[b])),
    "rewards/rejected": beta * mean(pr.map((_, b) => pr[b] - rr[b])),
    "rewards/margins": beta * mean(margins),
    "rewards/accuracies": mean(margins.map((h) => (h > 0 ? 1 : 0))),
  };
  const named = Object.fromEntries(NAMES.map((name, i) => [name, grads[i]]));
  return { loss: mean(losses), per_example: losses, grads: named, metrics };
}

require("readline").createInterface({ input: process.stdin }).on("line", (line) => {
  const { id, method, objective, dialect, params, inputs } = JSON.parse(line);
  const answer = { id };
  try {
    const known = `${objective}/${dialect}` === "dpo/plain";
    answer.result = method === "supports" ? known : dpo(params, inputs);
  } catch (error) { answer.error = error.message; }
  const isLost = (value) => typeof value === "number" && !isFinite(value); // JSON has no Infinity
  console.log(JSON.stringify(answer, (_, value) => (isLost(value) ? String(value) : value)));
});
