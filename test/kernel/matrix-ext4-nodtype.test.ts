import { describeMatrix } from '../support/matrix.ts'

describeMatrix('ext4-nodtype')
