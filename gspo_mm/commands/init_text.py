"""The files that `gspo-mm init` writes, with places to fill in."""

import re


def aligned(text: str) -> str:
    """The text with comments behind values in one column; lines with a quoted text stay as they are."""
    return re.sub(r'^( *\w[^#"\n]*\S) +# ', lambda line: f"{line[1]:<35} # ", text, flags=re.MULTILINE)


_BEGIN = """\
# GSPO, made by `gspo-mm init` from {samples} samples: a start, to be changed. Every key: configs/keys.md in the sources.
#   gspo-mm preflight {file} --all      # can all be read and judged, and what are reference answers worth?
{train_by}
#   gspo-mm report runs/{name}
"""

# how a run begins: at once, or with a warm start on reference answers
AT_ONCE = "#   gspo-mm train {file}"
WARM = """\
#   gspo-mm sft {file} run.name={name}-sft policy.optimizer.lr={sft_lr}     # a warm start on the reference answers
#   gspo-mm train {file} model.path=runs/{name}-sft/hf"""

_INPUTS = """
run:
  # folder under `dir`; the same name again resumes
  name: "{name}"
  dir: runs # where run folders are kept
  seed: 0 # data order, sampling, initialisation

model:
  path: {model}

data:
  train: {train}
  # held out; only ever evaluated on
  validation: {validation}
  max_prompt_tokens: {max_prompt_tokens} # the longest seen has {longest}; longer ones are skipped and counted, never cut
"""

_LEARNING = """
reward:
  # which parts score which task, and their weights
  file: {reward}

advantage:
  std: unbiased # group-normalised: (r - mean) / std

loss:
  type: gspo # one length-normalised ratio per answer; others: gspo_mm/loss/README.md
  # The paper's 3e-4 and 4e-4 for answers of 1,000 tokens or more, times sqrt(1000 / {mean}) for these. Look at the report's
  # clip fraction: near 0 the range is too wide, near 1 too narrow.
  clip_low: {clip_low}
  clip_high: {clip_high}
"""

_END = """\
  micro_batch_tokens: {micro} # packed tokens per pass; at least the longest prompt and answer together
  optimizer:
    lr: {lr} # largest learning rate
    min_lr_ratio: {min_lr_ratio} # 0.1: cosine down to a tenth; 1: stays what it is
    warmup_steps: 5 # training steps
    beta2: 0.98 # Adam's decay of squared gradients
    grad_clip: {grad_clip} # largest global gradient norm

train:
  steps: 200 # rollout batches
  updates_per_batch: {updates} # optimizer steps per rollout batch; from the second on the clip can act
  eval_every: 20 # steps
  eval_prompts: 256 # held-out prompts, answered greedily

sft:
  steps: 100 # optimizer steps of the warm start
  batch_size: 32 # sequences per optimizer step

checkpoint:
  every: 50 # steps
  keep: 2 # older checkpoints are removed

observe:
  save_rollouts_every: 10 # answers with images and reward parts, for the report
"""

# how a run on a CPU learns, as the quick start does, and one on GPUs, as the published recipes do
LEARNS_ON_CPU = {"updates": 2, "min_lr_ratio": 0.1, "grad_clip": 0.3}
LEARNS_ON_GPUS = {"updates": 4, "min_lr_ratio": 1.0, "grad_clip": 1.0}

ON_CPU = (
    _BEGIN
    + _INPUTS
    + """
rollout:
  engine: embedded # transformers in this process, on the synced weights
  prompts_per_step: 16 # groups per step
  group_size: 16 # answers per prompt (G)
  drop_dead_groups: true # answers that all earn the same teach nothing: other prompts take their place
  max_batch: 256 # sequences decoded together
  sampling:
    temperature: 1.0 # 1: the policy's own distribution
    max_new_tokens: {max_new_tokens} # {why}
"""
    + _LEARNING
    + """
policy:
  dtype: float32 # bfloat16 on GPUs
"""
    + _END
)

ON_GPUS = (
    _BEGIN
    + """\
# For {gpus} {gpu}; its memory and time, by calculation:
#   gspo-mm plan {file} --nodes {nodes} --gpus-per-node {per_node} --gpu {gpu}
#   scripts/slurm/submit.sh {file} --nodes {nodes}      # or torchrun: README.md
"""
    + _INPUTS
    + """
rollout:
  engine: sglang # answers come from servers, over HTTP
  prompts_per_step: {prompts} # groups per step: a multiple of updates_per_batch x data-parallel ranks
  group_size: 16 # answers per prompt (G)
  max_staleness: 0 # servers sleep while the policy trains: sample, then train, in turn
  sampling:
    temperature: 1.0 # 1: the policy's own distribution
    max_new_tokens: {max_new_tokens} # {why}
  sglang:
    start: {start}
    servers: {servers} # on each machine
    tp: {tp} # GPUs per server
    colocate: true # servers give their memory back while the policy trains
    mem_fraction: 0.4 # of GPU memory, for weights and key/value cache

sync:
  mode: tensor # through the memory of the GPUs that both share
"""
    + _LEARNING
    + """
policy:
  dtype: bfloat16 # parameters and activations
  freeze: {freeze}
  parallel: # what is left over is data parallelism
    {parallel}
  recompute: {recompute}
"""
    + _END
)

REWARD = """\
# Rewards by `gspo-mm init`, by the kind of the answers: a start, to be changed. configs/rewards/README.md has all parts.
#   gspo-mm reward check {file}    # once it has `cases:`
name: {name}
# what of a response is its answer; null: all of it
extract: {extract}
parts:
{parts}"""

PARTS = {
    "number": """\
  - name: number
    type: number # equal numbers
    tasks: {tasks}
    accuracy: true # decides whether an answer counts as correct
    weight: 0.9
""",
    "box_iou": """\
  - name: box
    type: box_iou # overlap of both boxes, in the same unit; README.md says how to convert
    tasks: {tasks}
    accuracy: 0.5 # correct from this overlap on
    weight: 0.9
    args: {{at_least: 0.4}} # a smaller overlap earns nothing
""",
    "grounding_f1": """\
  - name: boxes
    type: grounding_f1 # F1 of all boxes, in the same unit; README.md says how to convert, and to compare labels
    tasks: {tasks}
    accuracy: true # correct where it is 1
    weight: 0.9
""",
    "choice": """\
  - name: choice
    type: choice # the right letter and no other; README.md says how the texts of options count, too
    tasks: {tasks}
    accuracy: true # decides whether an answer counts as correct
    weight: 0.9
""",
    "math": """\
  - name: math
    type: math # the same value or expression
    tasks: {tasks}
    accuracy: true # decides whether an answer counts as correct
    weight: 0.9
""",
    "normalised": """\
  - name: words
    type: normalised # equal texts, up to case, punctuation and articles
    tasks: {tasks}
    accuracy: true # decides whether an answer counts as correct
    weight: 0.9
""",
}

# what a part is called, and what stands between the tags
FORMATS = {
    "format": "[^<>]*",
    # of its own: where any answer in tags earned it, what is no box would be as good as a box that is wrong
    "box_format": r"[^<>]*\[\s*-?[\d.]+(\s*,\s*-?[\d.]+){3}\s*\][^<>]*",
}

FORMAT = """\
  - name: {name}
    type: format # the whole text
    tasks: {tasks}
    weight: 0.1
    args: {{pattern: '(?s).*<answer>{inside}</answer>\\s*'}}
"""
