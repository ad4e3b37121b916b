#!/bin/sh
# Install the web servers, and the browser, that the tests run, where they are missing and apt-get may be used. Starts none of them.
set -eu
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
policy=/usr/sbin/policy-rc.d  # exit code 101 forbids package scripts to start a daemon

missing() {
    while read -r package file; do
        for o in $file; do [ -e "$o" ] || command -v "$o" >/dev/null || printf '%s ' "$package"; break; done
    done <<EOF
caddy                caddy
nginx                nginx
apache2              apache2
libapache2-mod-fcgid /usr/lib/apache2/modules/mod_fcgid.so
lighttpd             lighttpd
h2o                  h2o
haproxy              haproxy
libfcgi-bin          cgi-fcgi
spawn-fcgi           spawn-fcgi
php-fpm              /usr/sbin/php-fpm*
libfaketime          /usr/lib/*/faketime/libfaketime.so.1
chromium             chromium
chromium-driver      chromedriver
systemd              systemd-analyze
EOF
}

give_up() {
    echo "web servers not installed ($1): $(missing)- their tests are skipped" >&2
    [ -z "${CI:-}" ] || [ "$CI" = false ] || exit 1
    exit 0
}

wanted=$(missing)
[ -n "$wanted" ] || exit 0
[ "$(id -u)" = 0 ] || give_up "not root"
command -v apt-get >/dev/null || give_up "no apt-get"

restore() { rm -f "$policy"; [ ! -e "$policy.kept" ] || mv "$policy.kept" "$policy"; }
trap restore EXIT
trap 'exit 130' INT TERM
[ ! -e "$policy" ] || mv "$policy" "$policy.kept"
printf '#!/bin/sh\nexit 101\n' >"$policy"
chmod 755 "$policy"

export DEBIAN_FRONTEND=noninteractive
echo "installing web servers: $wanted" >&2
apt() { apt-get -qq -o DPkg::Lock::Timeout=300 "$@" >/dev/null; }
apt update || true
# shellcheck disable=SC2086  # a list of packages
apt install -y --no-install-recommends $wanted || {
    for o in $wanted; do apt install -y --no-install-recommends "$o" || true; done
}
[ -z "$(missing)" ] || give_up "apt-get could not"
