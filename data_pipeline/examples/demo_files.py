"""The names of the files that `biroute data demo` makes, and that configs/demo.yaml reads."""

ENGLISH_NAME = "english.jsonl.zst"
CHINESE_NAME = "chinese.jsonl.zst"
