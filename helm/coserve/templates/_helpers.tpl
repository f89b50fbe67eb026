{{- define "coserve.labels" -}}
app.kubernetes.io/part-of: coserve
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{/* What selects the pods of a component: (dict "root" . "name" "coserve-operator") */}}
{{- define "coserve.selector" -}}
app.kubernetes.io/name: {{ .name }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
{{- end }}

{{- define "coserve.image" -}}
{{ .Values.operator.image | default (printf "coserve-operator:%s" .Chart.AppVersion) }}
{{- end }}

{{- define "coserve.agentImage" -}}
{{ .Values.operator.agentImage | default (printf "coserve-agent:%s" .Chart.AppVersion) }}
{{- end }}

{{- define "coserve.accessSecret" -}}
{{ .Values.access.existingSecret | default "coserve-access" }}
{{- end }}

{{- define "coserve.redisUrl" -}}
{{- if eq .Values.redis.mode "Own" -}}
redis://coserve-redis.{{ .Release.Namespace }}.svc:6379/0
{{- else -}}
{{ .Values.redis.external.url }}
{{- end -}}
{{- end }}

{{/* Where pods of this chart run: (dict "root" . "values" .Values.operator) */}}
{{- define "coserve.placement" -}}
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
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
