"""Hook of mkdocs: links from a page to a file of the repository outside of docs/.

On GitHub and the Hub such a link leads to the file. The site does not hold the files, so there only the text of the
link stays. A link to a file that is missing stops the build.
"""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)#]*)(#[^)]*)?\)")


def on_page_markdown(markdown, page, **kwargs):
    def text_of(link: re.Match) -> str:
        if not (ROOT / link[2]).exists():
            raise ValueError(f"{page.file.src_path} links to {link[2]}, which does not exist.")
        return f"`{link[2]}`" if link[1] == Path(link[2]).name else f"{link[1]} (`{link[2]}`)"

    return OUTSIDE.sub(text_of, markdown)
