"""Django, all of a project in one file: its admin with a database, a form, an upload, static files, and events.

    pip install django whitenoise
    python examples/django_app.py migrate && python examples/django_app.py createsuperuser
    fastcgi dev examples/django_app.py:application
    fastcgi serve examples/django_app.py:application --bind app.sock --threads 8    # and: fastcgi config nginx ...

In a project of the usual form it is `fastcgi serve mysite.wsgi:application`, started where manage.py is.
"""
import hashlib
import logging
import os
import secrets
import sys
import time
from itertools import count
from pathlib import Path

from django.conf import settings
from django.contrib import admin
from django.core.management import execute_from_command_line
from django.core.wsgi import get_wsgi_application
from django.http import HttpResponse, JsonResponse, StreamingHttpResponse
from django.shortcuts import redirect
from django.template import engines
from django.urls import path
from django.views.decorators.http import require_POST, require_safe

log = logging.getLogger(__name__)
MOUNT = os.environ.get("MOUNT", "")  # Django makes URLs of static files before any request, so it has to be told

settings.configure(
    ROOT_URLCONF=__name__,
    SECRET_KEY=os.environ.get("SECRET_KEY") or secrets.token_hex(32),
    ALLOWED_HOSTS=["localhost", "127.0.0.1"],
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": os.environ.get("DATABASE", "db.sqlite3")}},
    DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
    USE_TZ=True,
    FORCE_SCRIPT_NAME=MOUNT or None,
    STATIC_URL=f"{MOUNT}/static/",
    STATICFILES_DIRS=[Path(__file__).parent / "static"],
    WHITENOISE_USE_FINDERS=True,  # without `collectstatic`
    INSTALLED_APPS=["django.contrib.admin", "django.contrib.auth", "django.contrib.contenttypes",
                    "django.contrib.messages", "django.contrib.sessions", "django.contrib.staticfiles"],
    MIDDLEWARE=["django.middleware.security.SecurityMiddleware",
                "whitenoise.middleware.WhiteNoiseMiddleware",
                "django.contrib.sessions.middleware.SessionMiddleware",
                "django.middleware.common.CommonMiddleware",
                "django.middleware.csrf.CsrfViewMiddleware",
                "django.contrib.auth.middleware.AuthenticationMiddleware",
                "django.contrib.messages.middleware.MessageMiddleware"],
    TEMPLATES=[{"BACKEND": "django.template.backends.django.DjangoTemplates", "APP_DIRS": True, "OPTIONS": {
        "context_processors": ["django.template.context_processors.request",
                               "django.contrib.auth.context_processors.auth",
                               "django.contrib.messages.context_processors.messages"]}}])

PAGE = """{% load static %}<!DOCTYPE html>
<link rel="stylesheet" href="{% static 'style.css' %}">
<title>Django</title>
<p>Hello, {{ request.session.name|default:'stranger' }}! This page is {{ request.build_absolute_uri }}
<p><a href="{% url 'admin:index' %}">Admin</a>
<form method="post" action="{% url 'name' %}">{% csrf_token %}
<input name="name"> <button>This is my name</button></form>
<form method="post" action="{% url 'upload' %}" enctype="multipart/form-data">{% csrf_token %}
<input type="file" name="file"> <button>Upload</button></form>
"""


@require_safe
def index(request): return HttpResponse(engines["django"].from_string(PAGE).render(request=request))


@require_POST
def name(request):
    request.session["name"] = request.POST["name"]
    return redirect("index")


@require_POST
def upload(request):
    file = request.FILES["file"]
    sha = hashlib.sha256()
    for chunk in file.chunks(): sha.update(chunk)
    return JsonResponse({"name": file.name, "sha256": sha.hexdigest()})


def events(request):
    "Each piece that is yielded leaves at once; when the visitor has, the generator is closed."
    return StreamingHttpResponse(lines(), content_type="text/event-stream",
                                 headers={"X-Accel-Buffering": "no"})  # that is for nginx


def lines():
    try:
        for i in count():
            yield f"data: {i}\n\n"
            time.sleep(.2)
    finally: log.info("the visitor has left")


def fail(request):
    "The traceback is in the log, and nothing of it in the browser."
    return HttpResponse(str(1 / 0))


application = get_wsgi_application()  # from here on the admin knows of its models
urlpatterns = [path("", index, name="index"), path("name", name, name="name"), path("upload", upload, name="upload"),
               path("events", events), path("fail", fail), path("admin/", admin.site.urls)]

if __name__ == "__main__":
    if sys.argv[1:]: execute_from_command_line(sys.argv)
    else:  # started by a web server, such as Apache's mod_fcgid, as often as it wants
        from fastcgi import serve
        serve(application)
