import sys

from gevent import monkey

monkey.patch_all()

from applications import wsgi  # noqa: E402
from gevent_fastcgi.server import FastCGIServer  # noqa: E402
from gevent_fastcgi.wsgi import WSGIRequestHandler  # noqa: E402

FastCGIServer(sys.argv[1], WSGIRequestHandler(wsgi), num_workers=1).serve_forever()
