"""Data Preprocessing: MedMCQA -> checked questions -> prompts -> tokens -> packed rows."""

from medqlora.data.audit import AuditReport, audit_questions, audit_rows
from medqlora.data.datamodule import MedMCQADataModule
from medqlora.data.medmcqa import read_questions
from medqlora.data.prompts import Control, GemmaChatPrompt, Prompt, PromptTemplate
from medqlora.data.readers import read_hub, read_rows
from medqlora.data.tokenization import (
    TextEncoder,
    TokenizedQuestions,
    letter_ids,
    load_tokenizer,
    tokenize_questions,
)

__all__ = [
    "AuditReport",
    "Control",
    "GemmaChatPrompt",
    "MedMCQADataModule",
    "Prompt",
    "PromptTemplate",
    "TextEncoder",
    "TokenizedQuestions",
    "audit_questions",
    "audit_rows",
    "letter_ids",
    "load_tokenizer",
    "read_hub",
    "read_questions",
    "read_rows",
    "tokenize_questions",
]
