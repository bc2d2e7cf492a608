"""Conversations about the Universal Declaration of Human Rights, to fine-tune on: in each language the question for an
article, and the article.

    python tools/make_chat.py        # writes configs/mimo-nano/udhr/chat.jsonl
"""
import json
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "configs/mimo-nano/udhr"
QUESTIONS = {
    "zh": "《世界人权宣言》第{}条的内容是什么？",
    "en": "What does article {} of the Universal Declaration of Human Rights say?",
    "ja": "世界人権宣言の第{}条には何と書かれていますか。", "ko": "세계 인권 선언 제{}조의 내용은 무엇입니까?",
    "fr": "Que dit l'article {} de la Déclaration universelle des droits de l'homme ?",
    "de": "Was steht in Artikel {} der Allgemeinen Erklärung der Menschenrechte?",
    "es": "¿Qué dice el artículo {} de la Declaración Universal de Derechos Humanos?",
}


def main() -> None:
    with open(FOLDER / "chat.jsonl", "w") as out:
        for language, question in QUESTIONS.items():
            for line in (FOLDER / f"train.{language}.jsonl").read_text().splitlines():
                record = json.loads(line)
                if record["id"].isdecimal():      # the preamble has no number
                    messages = [{"role": "user", "content": question.format(record["id"])},
                                {"role": "assistant", "content": record["text"]}]
                    out.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
