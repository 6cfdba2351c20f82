"""`fedsam ...`: the stages, and the tools beside them."""

import os
import sys
from importlib import import_module

import fedsam_core
from fedsam_core import logs

COMMANDS = {
    "demo": "a federation of three synthetic hospitals on this machine, in minutes",
    "selections": "what each layer selection trains and sends",
    "data": "check a folder of scans: sites, cases, spacings, and everything that is wrong",
    "prepare": "read and check every scan, and store it ready for training",
    "doctor": "look at everything that a run will need, on every node, before it begins",
    "ablate": "many layer selections over one cohort: a study, its trials, its table",
    "federate": "train adapter layers across sites; only the masked sum is opened",
    "resume": "go on with a run that was stopped or whose driver was lost, from its last finished round",
    "stop": "end a run within seconds, wherever it runs; it can be resumed",
    "runs": "which federations there are: running, stopped, finished; how far, and how good",
    "centralize": "train on the pooled slices of all sites, to compare with; only where pooling is allowed",
    "baselines": "each site alone (local), or the backbone as it is (zero-shot), to compare with",
    "evaluate": "segment and score a cohort with a trained adapter",
    "report": "what a study found: a page with table, figures, atlas and where it all comes from",
    "pretrain": "make the small SAM that the others start from, on scenes drawn by a program",
    "predict": "a mask for a scan, or for every scan of a folder: NIfTI or DICOM",
    "export": "write a trained model as PEFT adapter, plain SAM checkpoint and ONNX",
    "verify": "replay the record of a run: signatures, survivors, sums, global states",
    "track": "send what runs could not to MLflow, and start an MLflow server",
    "certs": "make the certificates with which a Ray cluster's nodes know each other and encrypt",
    "submit": "run a stage as a job on a Ray cluster",
    "site": "at a hospital: dial in to an aggregator and take part in its runs",
    "gateway": "certificates for hospitals that dial in",
    "keys": "make a site's identity, and see whom a roster trusts",
}


def main() -> None:
    """Hands over to the command's own module, so that one command does not wait for another's imports."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["--log-json"]:  # before a command is imported, and for all processes that it starts
        os.environ[logs.VARIABLE] = "1"
        arguments = arguments[1:]
    if arguments and arguments[0] in COMMANDS:
        module = import_module(f"pipelines.{arguments[0]}")
        (module.STAGE.main if hasattr(module, "STAGE") else module.main)(arguments[1:])
    elif arguments in (["--version"], ["-V"]):
        print(f"fedsam {fedsam_core.__version__}")
    else:
        known = not arguments or arguments[0] in ("-h", "--help")
        complaint = "" if known else f"fedsam: no command {arguments[0]!r}\n\n"
        print(complaint + _help(), file=None if known else sys.stderr)
        sys.exit(0 if known else 2)


def _help() -> str:
    lines = [f"  {name:<12}{meaning}" for name, meaning in COMMANDS.items()]
    return "\n".join(
        [
            "usage: fedsam [--log-json] COMMAND [--help] ...",
            "",
            "Federated, parameter-efficient fine-tuning of Segment Anything for 3D medical segmentation.",
            "",
            *lines,
            "",
            f"--log-json, or {logs.VARIABLE}=1: every line is a JSON object with time, level, run, round and site.",
            "A stage takes `--config FILE key=value ...`; `fedsam COMMAND --help` lists the keys.",
        ]
    )


if __name__ == "__main__":
    main()
