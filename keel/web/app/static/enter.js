// Programs that preview links fetch the page but run no scripts: the link is used only by a browser.
document.getElementById("enter").submit();
