"""The page at `/` in a real browser."""

import pytest

from tests.soak.browser import CHROMIUM, DRIVER, MISSING, Browser

pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason=MISSING)

ANSWER = "document.querySelector('#talk .turn:not(.user)')"
NOTE = "document.querySelector('#talk .note').textContent"
BUTTON = "document.getElementById('go').textContent"


@pytest.fixture
def browser(tmp_path):
    with Browser(tmp_path / "profile") as browser:
        yield browser


def test_a_message_is_sent_and_its_stream_is_seen(start, browser, pytestconfig):
    # Calls of one round, so that a stream takes a while.
    with start("--rounds_per_call=1") as server:
        browser.open(server.url)
        browser.wait_for("document.getElementById('state').textContent === 'ready'")
        browser.wait_for("document.getElementById('model').textContent === 'tiny'")
        browser.run("document.getElementById('most').value = 80")
        # Every length that the answer has had, and what was marked then.
        browser.run(f"""
            window.seen = [];
            new MutationObserver(() => {{
              const answer = {ANSWER};
              if (answer) seen.push([answer.textContent.length,
                                     answer.querySelectorAll('.draft').length]);
            }}).observe(document.getElementById('talk'),
                        {{childList: true, subtree: true, characterData: true}});
        """)
        browser.write("#text", "abcabcabc\ue007")  # And the Enter key.
        assert browser.run("return document.querySelector('.user').textContent") == (
            "abcabcabc"
        )
        browser.wait_for(f"{NOTE}.includes(' · length') || {NOTE}.includes(' · stop')")
        seen = browser.run("return window.seen")
        lengths = [length for length, _ in seen]
        assert lengths == sorted(lengths) and len(set(lengths)) > 5
        # Some tokens are drafts, some are the model's own.
        drafts, pieces = browser.run(
            f"return [{ANSWER}.querySelectorAll('.draft').length, "
            f"{ANSWER}.children.length]"
        )
        assert 0 < drafts < pieces
        note = browser.run(f"return {NOTE}")
        assert "80 tokens" in note and "tokens/s" in note and "accepted drafts" in note
        assert browser.run(f"return {BUTTON}") == "Send"
        if path := pytestconfig.getoption("screenshot"):
            browser.wait_for("document.getElementById('length').textContent !== '–'")
            browser.screenshot(path)
        assert browser.complaints() == []


def test_errors_and_keys_are_shown(start, browser, tmp_path):
    (tmp_path / "keys").write_text("secret\n")
    with start(f"--api_key_file={tmp_path}/keys") as server:
        browser.open(server.url)
        browser.wait_for("!document.getElementById('keyed').hidden")
        browser.write("#key", "secret\t")
        browser.wait_for("document.getElementById('model').textContent === 'tiny'")
        browser.write("#text", "x" * 200 + "\ue007")
        browser.wait_for("document.querySelector('#talk .error')")
        assert "the model has room for 110" in browser.run(f"return {NOTE}")
        browser.click("#anew")
        assert browser.run("return document.querySelectorAll('.turn').length") == 0
        browser.write("#text", "abc\ue007")
        browser.wait_for(f"document.querySelector('.note') && {NOTE}.includes('token')")


def test_a_new_chat_begins_empty_though_an_answer_was_running(start, browser):
    with start("--rounds_per_call=1") as server:
        browser.open(server.url)
        browser.wait_for("document.getElementById('model').textContent === 'tiny'")
        browser.run("document.getElementById('most').value = 80")
        browser.write("#text", "abc\ue007")
        browser.wait_for(f"{ANSWER} && {ANSWER}.children.length")
        browser.click("#anew")
        browser.wait_for(f"{BUTTON} === 'Send'")
        assert browser.run("return talk.length") == 0
