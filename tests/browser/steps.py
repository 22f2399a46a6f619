"""What a person does in the chat, as functions."""

from __future__ import annotations

import time
from typing import Any

REPORT = (
    "At 08:40 on 3 June users lost access to the payroll portal. For 95 minutes, 1,240 people could not work. The "
    "problem was traced to an expired certificate. No data was lost. Ravi Okafor fixed it with a restart of the login "
    "service. As a follow-up, the team must automate the update process by 20 June."
)
SUMMARIZE = f"Summarize the following text.\n\n{REPORT}"


def composer(page: Any) -> Any:
    return page.get_by_label("Message", exact=True)


def send(page: Any, text: str, *, wait: bool = True) -> None:
    """Type and press Enter; wait: until the reply has come to its end."""
    before = page.locator("article").count()
    composer(page).fill(text)
    composer(page).press("Enter")
    if wait:
        until(page, f"document.querySelectorAll('article').length >= {before + 2}")
        settled(page)


def until(page: Any, expression: str, seconds: float = 60.0) -> None:
    """Wait until a JavaScript expression is true. Playwright's own wait_for_function needs eval, which the page's
    policy forbids."""
    deadline = time.monotonic() + seconds
    while not page.evaluate(expression):
        if time.monotonic() > deadline:
            raise AssertionError(f"{expression}\nnot in {seconds} s; the page says: {page.inner_text('main')[-800:]}")
        page.wait_for_timeout(15)


def settled(page: Any) -> None:
    """Until there is a last reply and nothing streams."""
    until(
        page,
        """(() => {
      const last = document.querySelector("#messages article:last-child");
      return last && last.classList.contains("assistant") && last.getAttribute("aria-busy") === "false"
        && document.querySelector("#stop").hidden;
    })()""",
    )


def replies(page: Any) -> Any:
    return page.locator("article.assistant")


def last_reply(page: Any) -> str:
    return str(replies(page).last.locator(".prose").last.inner_text())


def tool(page: Any, article: Any, name: str) -> None:
    """Press one of a message's tools."""
    article.hover()
    article.get_by_role("button", name=name, exact=True).click()


def menu(page: Any, button: Any, item: str) -> None:
    button.click()
    page.get_by_role("menuitem", name=item).click()


def conversation_rows(page: Any) -> list[str]:
    return [str(text) for text in page.locator("#conversations .open").all_inner_texts()]
