# Certificates and kubeconfigs, made anew at each start.
# shellcheck shell=bash

certificate() { # NAME SUBJECT [SUBJECT ALTERNATIVE NAMES]
  openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout "$1.key" -out "$1.csr" -subj "$2"
  openssl x509 -req -in "$1.csr" -CA ca.crt -CAkey ca.key -CAcreateserial -days 365 -out "$1.crt" \
    -extfile <(echo "subjectAltName=${3:-DNS:${1##*/}}")
}

kubeconfig_for() { # NAME: of a certificate
  cat >"$1.kubeconfig" <<C
apiVersion: v1
kind: Config
clusters:
- name: dev
  cluster: {server: "https://127.0.0.1:6443", certificate-authority-data: $(base64 -w 0 ca.crt)}
users:
- name: "$1"
  user: {client-certificate-data: $(base64 -w 0 "$1.crt"), client-key-data: $(base64 -w 0 "$1.key")}
contexts:
- {name: dev, context: {cluster: dev, user: "$1"}}
current-context: dev
C
}

make_pki() ( # NODE...
  umask 077
  mkdir -p "$PKI"
  cd "$PKI" || exit
  exec 2>"$LOGS/pki.log"
  openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout ca.key -out ca.crt \
    -days 365 -subj "/CN=$ID-ca"
  certificate apiserver /CN=kube-apiserver \
    "DNS:kubernetes,DNS:kubernetes.default,DNS:kubernetes.default.svc,DNS:localhost,$(
    )IP:127.0.0.1,IP:$SERVICES.0.1,IP:$NODE_IP"
  certificate front-proxy /CN=front-proxy
  certificate admin /O=system:masters/CN=admin
  certificate controller-manager /CN=system:kube-controller-manager
  certificate scheduler /CN=system:kube-scheduler
  certificate proxy /CN=system:kube-proxy
  local name
  for name; do certificate "$name" "/O=system:nodes/CN=system:node:$name"; done
  for name in admin controller-manager scheduler proxy "$@"; do kubeconfig_for "$name"; done
  openssl ecparam -genkey -name prime256v1 -noout -out sa.key
  openssl ec -in sa.key -pubout -out sa.pub
)
