"""Fine-tune a model with TRL and PEFT, then let it write: `python fine_tune_with_trl.py MODEL DATA.jsonl [STEPS]`.

MODEL is a folder that `fmem export` wrote, DATA.jsonl holds a `prompt` and a `completion` on each line. Needs `trl` and `peft`.
"""

import sys

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import factorization_memory.models.huggingface  # noqa: F401 - makes transformers know the model

folder, data, steps = sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 200
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)


def tokens(row):
    """Token ids, and which of them to learn. TRL would add the end as text, which for this tokenizer is just characters."""
    prompt, completion = tokenizer(row["prompt"])["input_ids"], tokenizer(row["completion"])["input_ids"]
    completion.append(tokenizer.eos_token_id)
    return {"input_ids": prompt + completion, "completion_mask": [0] * len(prompt) + [1] * len(completion)}


rows = load_dataset("json", data_files=data, split="train")
trainer = SFTTrainer(
    model,
    args=SFTConfig(
        output_dir="fine-tuned",
        max_steps=steps,
        learning_rate=1e-3,
        max_length=512,
        completion_only_loss=True,
        report_to=[],
        bf16=torch.cuda.is_available(),
    ),
    train_dataset=rows.map(tokens, remove_columns=rows.column_names),
    processing_class=tokenizer,
    # The projections around the memory and of the feed-forward layer; rates and affinities stay as they are.
    peft_config=LoraConfig(r=8, target_modules=["value", "output", "gate_up", "down"]),
)
trainer.train()
trainer.model.merge_and_unload().save_pretrained("fine-tuned/merged")
tokenizer.save_pretrained("fine-tuned/merged")

tuned = AutoModelForCausalLM.from_pretrained("fine-tuned/merged").eval()
prompt = tokenizer(["It was"], return_tensors="pt")
with torch.no_grad():
    print(tokenizer.decode(tuned.generate(**prompt, max_new_tokens=20, do_sample=False)[0]))
