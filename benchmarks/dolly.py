"""What every benchmark on dolly is told: where its rows and GPT-2's tokenizer are."""

import argparse


def dolly_parser(doc: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", default="databricks/databricks-dolly-15k", help="dolly: Hub id or local file"
    )
    parser.add_argument(
        "--tokenizer", default="openai-community/gpt2", help="GPT-2's: Hub id or local folder"
    )
    return parser
