import subprocess
import sys

from prx_post.cli import COMMANDS, main
from prx_post.stages.registry import REGISTRY


def test_help_lists_every_command_without_importing_torch():
    program = (
        "import sys; from prx_post.cli import main; code = main(['--help']); "
        "heavy = {'torch', 'transformers', 'diffusers', 'numpy', 'trl'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for command in (*REGISTRY, *(name for name, command in COMMANDS.items() if command.listed)):
        assert f"  {command}" in result.stdout


def test_version_and_unknown_commands(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("prx-post 0.")
    assert main(["train"]) == 2
    assert "'train' is not a command. Choose from sft, distill, dpo, draft, grpo, generate" in capsys.readouterr().err


def test_help_of_a_command_documents_every_setting(prx_post):
    result = prx_post("sft", "--help", check=True)
    for setting in ("model_name_or_path", "dataset_name", "caption_dropout", "ema_decay"):
        assert f"--{setting}" in result.stdout
    assert "Fraction of samples trained on the encoded empty prompt" in " ".join(result.stdout.split())


def test_a_stages_help_and_its_typos_are_answered_before_torch_is_imported():
    program = (
        "import sys; from prx_post.cli import main; code = main(['sft', '--lerning_rate', '1', '--lr', '2']); "
        "heavy = {'torch', 'diffusers', 'deepspeed', 'accelerate', 'numpy'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 2, result.stderr
    assert (
        "lerning_rate on the command line is not a setting of this command. Did you mean learning_rate?"
        in result.stderr
    )
    assert "lr on the command line is not a setting of this command. Here it is learning_rate." in result.stderr
