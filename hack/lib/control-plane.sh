# etcd, API server, controllers, scheduler, kube-proxy and DNS: how each is started.
# shellcheck shell=bash

start_etcd() { start init etcd "$BIN/etcd" --data-dir "$STATE/etcd" --unsafe-no-fsync --log-level warn; }

start_apiserver() {
  start init apiserver "$BIN/kube-apiserver" --etcd-servers http://127.0.0.1:2379 \
    --advertise-address "$NODE_IP" --service-cluster-ip-range "$SERVICES.0.0/16" --allow-privileged \
    --client-ca-file "$PKI/ca.crt" --tls-cert-file "$PKI/apiserver.crt" --tls-private-key-file "$PKI/apiserver.key" \
    --authorization-mode Node,RBAC --enable-admission-plugins NodeRestriction \
    --service-account-issuer https://kubernetes.default.svc \
    --service-account-key-file "$PKI/sa.pub" --service-account-signing-key-file "$PKI/sa.key" \
    --kubelet-client-certificate "$PKI/admin.crt" --kubelet-client-key "$PKI/admin.key" \
    --kubelet-preferred-address-types InternalIP \
    --enable-aggregator-routing \
    --proxy-client-cert-file "$PKI/front-proxy.crt" --proxy-client-key-file "$PKI/front-proxy.key" \
    --requestheader-client-ca-file "$PKI/ca.crt" --requestheader-allowed-names front-proxy \
    --requestheader-username-headers X-Remote-User --requestheader-group-headers X-Remote-Group \
    --requestheader-extra-headers-prefix X-Remote-Extra-
}

start_controller-manager() { # an HPA decides every 5 s, and counts a pod as soon as it is ready
  start init controller-manager "$BIN/kube-controller-manager" --kubeconfig "$PKI/controller-manager.kubeconfig" \
    --service-account-private-key-file "$PKI/sa.key" --root-ca-file "$PKI/ca.crt" --use-service-account-credentials \
    --leader-elect=false --horizontal-pod-autoscaler-sync-period 5s \
    --horizontal-pod-autoscaler-initial-readiness-delay 1s --horizontal-pod-autoscaler-cpu-initialization-period 5s
}

start_scheduler() {
  start init scheduler "$BIN/kube-scheduler" --kubeconfig "$PKI/scheduler.kubeconfig" --leader-elect=false
}

start_proxy() { # one for all nodes, since they share the network
  cat >"$STATE/proxy.yaml" <<C
kind: KubeProxyConfiguration
apiVersion: kubeproxy.config.k8s.io/v1alpha1
mode: nftables
clientConnection: {kubeconfig: $PKI/proxy.kubeconfig}
clusterCIDR: $SUBNET.0.0/16
hostnameOverride: $FIRST_NODE
conntrack: {maxPerCore: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}
C
  start init proxy "$BIN/kube-proxy" --config "$STATE/proxy.yaml"
}

start_dns() {
  cat >"$STATE/Corefile" <<C
.:53 {
  bind $NODE_IP
  ready $NODE_IP:8181
  errors
  cache 5
  kubernetes cluster.local in-addr.arpa {
    kubeconfig $KUBECONFIG_FILE dev
  }
}
C
  start init dns "$BIN/dns" -conf "$STATE/Corefile"
}

kubectl() { inside "$BIN/kubectl" --kubeconfig "$KUBECONFIG_FILE" "$@"; }

wait_for_etcd() { wait_for etcd 30 etcd inside curl --noproxy '*' -fs http://127.0.0.1:2379/health; }

wait_for_apiserver() { wait_for "the API server" 60 apiserver kubectl get --raw /readyz; }

wait_for_dns() { wait_for "cluster DNS" 60 dns inside curl --noproxy '*' -fs "http://$NODE_IP:8181/ready"; }
