{{/* A version as a label or a tag has it: 0.1.0+build.5 has a character too many */}}
{{- define "coserve.plain" -}}
{{ . | replace "+" "_" | trunc 63 | trimSuffix "-" | trimSuffix "_" | trimSuffix "." }}
{{- end }}

{{- define "coserve.labels" -}}
{{- $ours := dict "app.kubernetes.io/part-of" "coserve" "app.kubernetes.io/managed-by" .Release.Service }}
{{- $_ := set $ours "app.kubernetes.io/instance" .Release.Name }}
{{- $_ := set $ours "app.kubernetes.io/version" (include "coserve.plain" .Chart.AppVersion) }}
{{- $_ := set $ours "helm.sh/chart" (include "coserve.plain" (printf "%s-%s" .Chart.Name .Chart.Version)) }}
{{- merge $ours .Values.commonLabels | toYaml }}
{{- end }}

{{/* What selects the pods of a component: (dict "root" . "name" "coserve-operator") */}}
{{- define "coserve.selector" -}}
app.kubernetes.io/name: {{ .name }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
{{- end }}

{{/* Metadata of a component's pods: (dict "root" . "name" "coserve-operator" "values" .Values.operator) */}}
{{- define "coserve.podMetadata" -}}
labels:
  {{- $ours := merge (include "coserve.selector" . | fromYaml) (include "coserve.labels" .root | fromYaml) }}
  {{- merge $ours .values.podLabels | toYaml | nindent 2 }}
{{- with .values.podAnnotations }}
annotations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "coserve.image" -}}
{{ .Values.operator.image | default (printf "coserve-operator:%s" (include "coserve.plain" .Chart.AppVersion)) }}
{{- end }}

{{- define "coserve.agentImage" -}}
{{ .Values.operator.agentImage | default (printf "coserve-agent:%s" (include "coserve.plain" .Chart.AppVersion)) }}
{{- end }}

{{- define "coserve.accessSecret" -}}
{{ .Values.access.existingSecret | default "coserve-access" }}
{{- end }}

{{- define "coserve.certificateSecret" -}}
{{ .Values.metricsApi.certificate.existingSecret | default "coserve-metrics-api-certificate" }}
{{- end }}

{{- define "coserve.redisUrl" -}}
{{- if eq .Values.redis.mode "Own" -}}
{{ ternary "rediss" "redis" (ne .Values.redis.tls.existingSecret "") }}://{redis}.{{ .Release.Namespace }}.svc:6379/0
{{- else -}}
{{ .Values.redis.external.url }}
{{- end -}}
{{- end }}

{{/* Secret with the CA of Redis' certificate; empty where there is none of ours, or no TLS */}}
{{- define "coserve.redisCaSecret" -}}
{{ ternary .Values.redis.tls.existingSecret .Values.redis.external.caSecret (eq .Values.redis.mode "Own") }}
{{- end }}

{{/* How the operator runs a Redis for each namespace, as it takes it */}}
{{- define "coserve.tenantRedis" -}}
{{- $redis := .Values.redis }}
{{- $pod := dict "imagePullSecrets" .Values.imagePullSecrets "labels" $redis.podLabels "annotations" $redis.podAnnotations }}
{{- range $key := list "priorityClassName" "nodeSelector" "tolerations" "affinity" "topologySpreadConstraints" }}
{{- $_ := set $pod $key (index $redis $key) }}
{{- end }}
{{- $labels := merge (dict "app.kubernetes.io/part-of" "coserve" "app.kubernetes.io/instance" .Release.Name) .Values.commonLabels }}
{{- $how := dict "image" $redis.image "imagePullPolicy" $redis.imagePullPolicy "maxClients" (int $redis.maxClients) }}
{{- $_ := set $how "resources" $redis.resources }}
{{- $_ := set $how "labels" $labels }}
{{- $_ := set $how "pod" $pod }}
{{- $_ := set $how "networkPolicy" .Values.networkPolicies.enabled }}
{{- $_ := set $how "tlsSecret" $redis.tls.existingSecret }}
{{- toJson $how }}
{{- end }}

{{/* What agents' and feeders' pods get from the platform, as the operator takes it */}}
{{- define "coserve.podDefaults" -}}
{{- $defaults := dict }}
{{- range $key, $value := merge (dict "imagePullSecrets" .Values.imagePullSecrets) .Values.agents }}
{{- if $value }}{{ $_ := set $defaults $key $value }}{{ end }}
{{- end }}
{{- toJson $defaults }}
{{- end }}

{{/* Where pods of this chart run: (dict "root" . "name" "coserve-operator" "values" .Values.operator) */}}
{{- define "coserve.placement" -}}
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
topologySpreadConstraints:
  {{- $selector := dict "labelSelector" (dict "matchLabels" (include "coserve.selector" . | fromYaml)) }}
  {{- range .values.topologySpreadConstraints }}
  - {{- merge (deepCopy .) $selector | toYaml | nindent 4 }}
  {{- else }}
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels: {{- include "coserve.selector" . | nindent 8 }}
  {{- end }}
{{- end }}

{{- define "coserve.podSecurity" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "coserve.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}
