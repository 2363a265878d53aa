import subprocess
import sys

from prx_post.cli import COMMANDS, main


def test_help_lists_every_command_without_importing_torch():
    program = (
        "import sys; from prx_post.cli import main; code = main(['--help']); "
        "heavy = {'torch', 'transformers', 'diffusers', 'numpy', 'yaml'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for command in COMMANDS:
        assert f"  {command}" in result.stdout


def test_version_and_unknown_commands(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("prx-post 0.")
    assert main(["train"]) == 2
    assert "'train' is not a command. Choose from sft, distill, generate" in capsys.readouterr().err


def test_help_of_a_command_documents_every_setting(prx_post):
    result = prx_post("sft", "--help", check=True)
    for setting in ("model_name_or_path", "dataset_name", "caption_dropout", "ema_decay"):
        assert f"--{setting}" in result.stdout
    assert "Share of samples trained on the encoded empty prompt" in " ".join(result.stdout.split())
