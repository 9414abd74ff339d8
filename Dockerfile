# Both programs in one image. `make image` builds it without a Docker daemon; with one, after `make programs`:
#   docker build -t ghcr.io/beamline/beamline:0.1.0 .
FROM scratch
COPY target/image/context/ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
COPY target/image/context/beamline_worker target/image/context/beamline-operator /
USER 65532:65532
ENTRYPOINT ["/beamline_worker"]
