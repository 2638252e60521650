from configparser import ConfigParser
from setuptools import find_packages, setup

config = ConfigParser(delimiters=["="])
config.read("settings.ini", encoding="utf8")
c = config["DEFAULT"]
setup(
    name=c["lib_name"], version=c["version"], description=c["description"], author=c["author"], author_email=c["author_email"],
    url=c["git_url"], license="Apache-2.0", python_requires=f">={c['min_python']}",
    packages=find_packages(include=["neurocodec", "neurocodec.*"]),
    package_data={"neurocodec": ["data/**/*"]}, include_package_data=True,
    install_requires=c["requirements"].split(), extras_require={"dev": c["dev_requirements"].split(), "gguf": c["gguf_requirements"].split()},
    entry_points={"console_scripts": c["console_scripts"].split()},
    zip_safe=False,
)
