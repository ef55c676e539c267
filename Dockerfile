FROM python:3.14-slim

ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTEST_ADDOPTS="-p no:cacheprovider" \
    DATABASE_URL=sqlite:////data/db.sqlite3 \
    HOST=0.0.0.0 \
    PORT=8000

WORKDIR /app

# A layer of its own, which stays in the build cache when only the sources change.
COPY requirements.txt ./
RUN pip install --no-cache-dir --disable-pip-version-check --root-user-action=ignore -r requirements.txt

COPY . ./
# Compile now, because /app is read-only at run time. A new volume gets the owner of its mount point.
RUN python -m compileall -q . && install -d -o 10001 -g 10001 /data /replica

USER 10001:10001
VOLUME /data
EXPOSE 8000

HEALTHCHECK --interval=10s --timeout=5s --start-period=5s --retries=3 \
    CMD ["python", "-c", "import http.client, os, sys; c = http.client.HTTPConnection('127.0.0.1', os.environ['PORT'], timeout=4); c.request('GET', '/healthz'); sys.exit(c.getresponse().status != 200)"]

CMD ["python", "shop.py"]
