"""The names of all files in a run folder, spelled only here.

    RUN/
      config.json       the complete configuration          environment.json  versions, hardware, command line, date
      tokenizer.json    the tokenizer                       metrics.jsonl     one line per event, in the order of steps
      result.json       the outcome, once the run stopped   evaluation.json   see evaluation/run.py
      checkpoints/step-00000100/   see checkpoint.py        harness.json      see evaluation/harness_tasks.py
      report.html, plots/          see reports/report.py

`fmem demo` adds samples.json, inspection.json and recall_demo.json, which the report shows, and its packed text, corpus/;
`fmem import` adds sources.json, which describes the training data; `fmem compare` and
`fmem sweep` job.json, log.txt, failure.json and memory.json (see experiments/processes.py).
"""

from __future__ import annotations

LOCK_NAME = ".lock"

CONFIG_NAME = "config.json"
ENVIRONMENT_NAME = "environment.json"
TOKENIZER_NAME = "tokenizer.json"
METRICS_NAME = "metrics.jsonl"
RESULT_NAME = "result.json"
EVALUATION_NAME = "evaluation.json"
HARNESS_NAME = "harness.json"
SOURCES_NAME = "sources.json"

REPORT_NAME = "report.html"
PLOTS_NAME = "plots"
SAMPLES_NAME = "samples.json"
INSPECTION_NAME = "inspection.json"
RECALL_DEMO_NAME = "recall_demo.json"
CORPUS_NAME = "corpus"

JOB_NAME = "job.json"
LOG_NAME = "log.txt"
FAILURE_NAME = "failure.json"
MEMORY_NAME = "memory.json"

CHECKPOINTS_NAME = "checkpoints"
STATE_NAME = "state.json"
WEIGHTS_NAME = "model.safetensors"
OPTIMIZER_NAME = "optimizer.safetensors"
CARRIED_NAME = "carried.safetensors"
