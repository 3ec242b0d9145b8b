{{/* The image of all programs. */}}
{{- define "virtiofs.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{/* Labels of the objects of a program; dict "root" . "name" NAME. */}}
{{- define "virtiofs.labels" -}}
{{ include "virtiofs.selector" . }}
app.kubernetes.io/part-of: virtiofs-operator
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
{{- end }}

{{/* Labels that select its pods. */}}
{{- define "virtiofs.selector" -}}
app.kubernetes.io/name: {{ .name }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
{{- end }}

{{/* Image of every pod. */}}
{{- define "virtiofs.container-image" -}}
image: {{ include "virtiofs.image" . }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
{{- end }}

{{/* Pods on every node, with a priority class of system pods. */}}
{{- define "virtiofs.on-every-node" -}}
{{- with .Values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
tolerations:
  - operator: Exists
{{- with .Values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* Pods that are not bound to a node. */}}
{{- define "virtiofs.operator-placement" -}}
{{- with .Values.operator.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .Values.operator.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.operator.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* The node's directories, as options of agent and broker. */}}
{{- define "virtiofs.directories" -}}
- --runtime-dir=/run/virtiofs
- --kubelet-dir={{ .Values.kubeletDir }}
- --source-root=/host
{{- range .Values.allowedSources }}
- --allowed-source={{ . }}
{{- end }}
{{- end }}

{{/* Options, mount and volume of the certificate of metrics. */}}
{{- define "virtiofs.metrics-access" -}}
{{- if .Values.metrics.tlsSecret -}}
- --metrics-tls-cert=/etc/virtiofs/metrics/tls.crt
- --metrics-tls-key=/etc/virtiofs/metrics/tls.key
{{- if .Values.metrics.authorization }}
- --metrics-authorization
{{- end }}
{{- end }}
{{- end }}

{{- define "virtiofs.metrics-mount" -}}
{{- if .Values.metrics.tlsSecret -}}
- {name: metrics-certificate, mountPath: /etc/virtiofs/metrics, readOnly: true}
{{- end }}
{{- end }}

{{- define "virtiofs.metrics-volume" -}}
{{- if .Values.metrics.tlsSecret -}}
- name: metrics-certificate
  secret: {secretName: {{ .Values.metrics.tlsSecret }}, defaultMode: 0444}
{{- end }}
{{- end }}

{{/* CEL: this field of an object's metadata is as it was. */}}
{{- define "virtiofs.metadata-kept" -}}
&& (has(object.metadata.{{ . }}) ? has(oldObject.metadata.{{ . }}) && object.metadata.{{ . }} == oldObject.metadata.{{ . }}
: !has(oldObject.metadata.{{ . }}))
{{- end }}

{{/* Mounts of the host's directories in a container; dict "root" . "readOnly" BOOL. */}}
{{- define "virtiofs.source-mounts" -}}
{{- $readOnly := .readOnly }}
{{- range $i, $path := .root.Values.allowedSources }}
- name: source-{{ $i }}
  mountPath: /host{{ $path }}
  readOnly: {{ $readOnly }}
  # Later mounts and unmounts of the host below it are visible inside.
  mountPropagation: HostToContainer
{{- end }}
{{- end }}

{{- define "virtiofs.source-volumes" -}}
{{- range $i, $path := .Values.allowedSources }}
- name: source-{{ $i }}
  hostPath:
    path: {{ $path }}
    type: DirectoryOrCreate
{{- end }}
{{- end }}
