# An experiment, not kept: all stages of four seeds, then variants of some stages on the same SFT models. $OUT gets the numbers.
R=/tmp/res; export OMP_NUM_THREADS=1
timeout 150 python benchmarks/results.py --seeds 0 1 2 3 --stages reward --jobs 12 --device cuda --out $R --page $R/a.md
python - <<'P'
import json
L = [json.loads(l) for l in open("data/preference.jsonl")]
K = [l for l in L if not (l["kind"] == "wrong" and l["task"] in ("reverse", "sort"))]
open("/tmp/pref_nors.jsonl", "w").write("".join(json.dumps(l, ensure_ascii=False) + "\n" for l in K))
P
NO="--data /tmp/pref_nors.jsonl --eval_data data/preference_eval.jsonl"
MIX="--data data/identity.jsonl data/replay.jsonl --eval_data data/identity_eval.jsonl"
for s in 0 1 2 3; do
  S=$R/auto/seed$s; M="--model $S/sft --device cuda --no-compile --seed $s --save_every 100000"
  [ -e $S/sft/summary.json ] || continue
  try() { n=$1; shift; (timeout 170 "$@" --out $S/$n > $S/$n.log 2>&1) & }
  try grpo python train_grpo.py $M
  try ppo python train_ppo.py $M --reward_model $S/reward
  try dpo1 python train_dpo.py $M --beta 0.5 --lr 1e-5 --epochs 2
  if [ $s -lt 2 ]; then
    try dpo2 python train_dpo.py $M --beta 0.5 --lr 2e-5 --epochs 2 $NO
    try dpo3 python train_dpo.py $M --beta 0.1 --lr 1e-5 --epochs 1 $NO
    try lora_mixed python train_lora.py $M $MIX
  fi
done
sleep 165; kill $(jobs -p) 2>/dev/null
cd $R && find . -name summary.json -o -name test.json -o -name metrics.jsonl -o -name '*.log' | tar czf $OUT/res.tgz -T -
