"The clamp app as a reader's browser sees it."
import pytest
from conftest import HOSTILE, needs_browser, open_app

from neurocodec.core.run import open_node
from neurocodec.sae.dictionary import DictionaryConfig, create_dictionary, save_dictionary


@pytest.fixture
def toy_run(results):
    "A run with a dictionary."
    node = open_node("13_train", {"run": "toy", "model": "nano", "corpus": "docs", "seed": 0, "layer": 2})
    save_dictionary(node, create_dictionary(DictionaryConfig(d_model=192, n_features=40, k=4)))
    node.finish()
    return results / "toy"


@needs_browser
def test_app_in_a_browser(toy_run, tmp_path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    with open_app("clamp", "toy", tmp_path) as (driver, wait, foreign):
        def button(text): return next(b for b in driver.find_elements(By.CSS_SELECTOR, ".nc-app button") if b.text == text)
        def texts(): return [x.text for x in driver.find_elements(By.CSS_SELECTOR, ".nc-text pre")]
        def pushes(): return [x.text for x in driver.find_elements(By.CSS_SELECTOR, ".nc-app select option") if "layer 2" in x.text]
        def write():  # a click is lost while the last one is worked on
            wait(lambda: button("write").is_enabled(), "no page, or one that stays busy")
            button("write").click()
        write()
        wait(lambda: len(texts()) == 2, "no two texts")
        assert texts()[0] == texts()[1] != "" and "the same text" in driver.find_element(By.CSS_SELECTOR, ".nc-app").text   # no push, same random numbers

        number = next(x for x in driver.find_elements(By.CSS_SELECTOR, ".nc-app .widget-text") if x.text.startswith("value")).find_element(By.TAG_NAME, "input")
        number.send_keys(Keys.CONTROL + "a")  # `clear` would let the page put its old value back; a modifier is held to the end of its call
        number.send_keys("300" + Keys.TAB)
        button("add push").click()
        wait(lambda: len(pushes()) == 1, "the push is not listed")
        write()
        wait(lambda: texts()[0] != texts()[1], "a neuron set to 300 at every position changed nothing")
        said = driver.find_element(By.CSS_SELECTOR, ".nc-app").text
        assert "they part at token" in said and "hooks left on the model: 0" in said and "300.00" in said

        box = driver.find_element(By.CSS_SELECTOR, ".widget-textarea textarea")
        box.clear(); box.send_keys(Keys.TAB)
        write()
        wait(lambda: "the prompt is empty" in driver.find_element(By.CSS_SELECTOR, ".nc-wrong").text, "an empty prompt was taken")
        box.send_keys(HOSTILE + Keys.TAB)
        write()
        wait(lambda: not driver.find_elements(By.CSS_SELECTOR, ".nc-wrong") and button("write").is_enabled(), "the new prompt was not continued")
        assert driver.title != "hacked" and not driver.find_elements(By.CSS_SELECTOR, ".nc-app img") and not foreign()
        driver.save_screenshot(str(tmp_path / "clamp.png"))
    assert not (toy_run / "61_clamp_app").exists(), "an app leaves nothing behind"
