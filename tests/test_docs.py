"""What the documentation quotes is what the programs say."""
import ast
import re


def texts(root):
    """All texts in the programs but their docstrings, with … for what is filled in."""
    for path in root.rglob("*.py"):
        if {"tests", ".venv"} & set(path.relative_to(root).parts):
            continue
        tree = ast.parse(path.read_text())
        docstrings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in docstrings:
                yield node.value


def quoted_messages(page):
    """The code in the first column of tables of messages."""
    for table in page.split("| message |")[1:]:
        for row in table.split("\n\n")[0].splitlines()[2:]:
            yield from re.findall(r"`([^`]+)`", row.split(" | ")[0])


def test_messages_of_the_page_on_faults_are_those_of_the_programs(root):
    said = "\n".join(texts(root))
    messages = list(quoted_messages((root / "docs" / "when-things-go-wrong.md").read_text()))
    assert len(messages) > 40
    unknown = [(message, part) for message in messages for part in message.split("…")
               if len(part.strip(" ():;,.")) > 3 and part.strip(" ():;,.") not in said]
    assert unknown == []
