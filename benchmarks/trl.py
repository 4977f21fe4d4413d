"""One device's fedsplit run against TRL's SFTTrainer, step by step.

``python -m benchmarks.trl`` fine-tunes the shipped small model on the same conversations twice: by
``fedsplit run`` with one device, the model cut after its second block, and by TRL's SFTTrainer on
the whole model (``pip install fedsplit[bench]``). Both have rsLoRA, AdamW, a cosine schedule with
warm-up over the run, gradients clipped to a norm of 1, and updates of four mini-batches. Each round
is one update, so the curve goes through everything that a run consists of. TRL reads the raw
conversations; both start from the same adapters and take the conversations in the same order.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from fedsplit.apps.config import job, load_config
from fedsplit.apps.launch.run import run
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedsplit.assets import default_checkpoint
from fedsplit.data import load_data, training_batches
from fedsplit.flower import Job
from fedsplit.models import load
from fedsplit.plan import DEVICE, Segment
from fedsplit.report import make_console, read_records
from fedsplit.seeds import generator

UPDATES, ACCUMULATE, BATCH, SAMPLES, SEQ_LEN = 12, 4, 2, 48, 128
RATE, WARMUP, CLIP, RANK, ALPHA = 1e-2, 3, 1.0, 8, 16
TOLERANCE = 1e-4


TEMPLATE = """\
{% for message in messages %}{{ '<|' + message['role'] + '|>' }}\
{% if message['role'] == 'assistant' %}\
{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}\
{% else %}{{ message['content'] }}{% endif %}{% endfor %}"""


def conversations() -> list[dict[str, list[dict[str, str]]]]:
    """Return questions on sums and their answers, of different lengths."""
    words = ("nothing", "one", "two", "three", "four", "five", "six")
    rows = []
    for i in range(SAMPLES):
        asked = f"What is {words[i % 7]} and {words[i // 7]}?" + " Please." * (i % 3)
        answer = f"It is {i % 7 + i // 7}." + f" {words[i % 7]} comes first." * (i % 4)
        said = (("user", asked), ("assistant", answer))
        rows.append({"messages": [{"role": role, "content": text} for role, text in said]})
    return rows


def chat_model(folder: Path) -> Path:
    """Write the shipped model with a chat template, which both sides read, and return `folder`."""
    shutil.copytree(default_checkpoint(), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def main() -> int:
    """Print both curves and how far they are apart; exit 1 if a step differs by more than 1e-4."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    console = make_console()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "chat.jsonl"
        rows = conversations()
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        overrides = [
            f"model.source={chat_model(Path(folder) / 'model')}",
            "data=chat",
            f"data.path={path}",
            f"data.seq_len={SEQ_LEN}",
            "data.padding=longest",
            "data.test_fraction=0.1",
            "fleet.devices=1",
            "strategy.cut=2",
            f"rounds={UPDATES}",
            f"evaluate.every={UPDATES}",
            f"train.batch_size={BATCH}",
            f"train.steps={ACCUMULATE}",
            f"train.accumulate={ACCUMULATE}",
            "train.schedule=cosine",
            f"train.warmup={WARMUP}",
            f"train.clip={CLIP}",
            "train.keep_state=true",
            f"train.optimizer.lr={RATE}",
            f"model.r={RANK}",
            f"model.alpha={ALPHA}",
            "model.dropout=0.0",
            "model.lora.use_rslora=true",
        ]
        output = Path(folder) / "run"
        if run([*overrides, f"output={output}"], console) != 0:
            return 1
        split = [record.train_loss for record in read_records(output)[1:]]
        settings = job(load_config(overrides))
        whole = train_with_trl(settings, rows, Path(folder) / "trl")
    apart = [abs(one - other) for one, other in zip(split, whole, strict=True)]
    for step, (one, other) in enumerate(zip(split, whole, strict=True), 1):
        console.print(f"step {step:3}: fedsplit {one:.6f}   TRL {other:.6f}")
    result = {"split": split, "trl": whole, "largest_difference": max(apart)}
    print(json.dumps(result))
    learnt = split[-1] < 0.9 * split[0]
    return int(max(apart) > TOLERANCE or not learnt)


def train_with_trl(settings: Job, rows: Sequence[dict[str, Any]], output: Path) -> list[float]:
    """Return the loss that SFTTrainer logs at every step, on the mini-batches of the run."""
    from trl import SFTConfig, SFTTrainer

    spec = settings.model
    tokenizer = AutoTokenizer.from_pretrained(spec.source)
    data = load_data(settings.data, tokenizer, 1, settings.seed).train(0)
    places = [
        sample
        for server_round in range(1, UPDATES + 1)
        for batch in training_batches(
            data, BATCH, generator(settings.seed, "batches", server_round, 0), ACCUMULATE
        )
        for sample in batch.samples
    ]
    by_text = {tokenizer.apply_chat_template(row["messages"], tokenize=False): row for row in rows}
    texts = [tokenizer.decode(_tokens(data.select([place]))) for place in places]
    in_order = [by_text[text] for text in texts]
    base = AutoModelForCausalLM.from_pretrained(spec.source)
    model = get_peft_model(
        base,
        LoraConfig(
            r=spec.r,
            lora_alpha=spec.alpha,
            lora_dropout=0.0,
            target_modules=spec.target_modules,
            use_rslora=True,
            task_type="CAUSAL_LM",
        ),
    )
    own = load(spec)
    set_peft_model_state_dict(model, own.adapters(Segment(DEVICE, 0, own.n_blocks)))
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(output),
            per_device_train_batch_size=BATCH,
            gradient_accumulation_steps=ACCUMULATE,
            max_steps=UPDATES,
            learning_rate=RATE,
            lr_scheduler_type="cosine",
            warmup_steps=WARMUP,
            max_grad_norm=CLIP,
            max_length=SEQ_LEN,
            train_sampling_strategy="sequential",
            assistant_only_loss=True,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_list(in_order),
        processing_class=tokenizer,
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def _tokens(sample: Mapping[str, Tensor]) -> Tensor:
    """Return the tokens of one sample, without padding."""
    (tokens,) = sample["input_ids"]
    return tokens[sample["attention_mask"][0] > 0] if "attention_mask" in sample else tokens


if __name__ == "__main__":
    sys.exit(main())
