"""Plotly's own bundle of Cartesian plots, compressed: a third of a page that holds all of plotly, and no network."""

from __future__ import annotations

import base64
import gzip
from functools import cache
from importlib import resources

from markupsafe import Markup

__all__ = ["plotly_script"]


# A file of the npm package plotly.js-cartesian-dist-min 4.1.1, unchanged; its license lies beside it.
_FILE = "plotly-cartesian.min.js"

_SCRIPT = """<script type="application/gzip" id="plotly">%s</script>
<script>
// Resolves to plotly, which the page holds compressed; null: the browser is too old to unpack it.
const plotly = (async () => {
  if (!("DecompressionStream" in window)) return null;
  const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent), c => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(stream).text();
  document.head.append(script);
  return window.Plotly;
})();
</script>"""


@cache
def plotly_script() -> Markup:
    """The elements of a page's head that define the promise ``plotly``: bars, lines, marks and heatmaps."""
    packed = gzip.compress(resources.files(__name__).joinpath(_FILE).read_bytes(), mtime=0)
    return Markup(_SCRIPT % base64.b64encode(packed).decode())
